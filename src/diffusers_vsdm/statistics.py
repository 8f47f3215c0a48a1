"""Tensors that are measured and not trained, and keep their precision when a pipeline is cast."""

from typing import Any, Self

from diffusers import ConfigMixin, ModelMixin


class Statistics(ModelMixin, ConfigMixin):
    """A module of buffers only, whose types `.to(dtype)` and `from_pretrained(dtype=...)` leave alone."""

    config_name = "config.json"

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As in Diffusers, except that a `dtype` is ignored."""
        for name in ("dtype", "torch_dtype"):
            kwargs.pop(name, None)
        return super().from_pretrained(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and buffer is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self
