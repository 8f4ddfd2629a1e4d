"""The inference engine. `from uniworld.engine import Engine, Request`."""

from uniworld.engine.chat import ChatReply
from uniworld.engine.engine import Engine
from uniworld.engine.request import Request, Result, StepCacheReport, StepInfo

__all__ = ["ChatReply", "Engine", "Request", "Result", "StepCacheReport", "StepInfo"]
