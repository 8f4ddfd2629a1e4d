"""The trainer: two stages on DeepSpeed. `uniworld train CONFIG` runs it."""
