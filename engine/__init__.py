"""The inference engine. `from uniworld.engine import Engine, Request`."""

from uniworld.engine.chat import ChatReply
from uniworld.engine.engine import Engine
from uniworld.engine.request import Request, Result, StepInfo

__all__ = ["ChatReply", "Engine", "Request", "Result", "StepInfo"]
