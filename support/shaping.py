"""What an adapter does around each update besides the gradient step (AdaLoRA, LoRI)."""

from support.registry import ADAPTERS


class Shaping:
    """The hooks of trainer.train, which do nothing here. `kept`: tensors that a checkpoint needs
    besides what trains."""

    def __init__(self, model, steps=None):
        self.kept = adapter_buffers(model)

    def before(self):
        """Called before an update, once the step's gradient is summed over ranks."""

    def after(self, step):
        """Called after optimizer step `step`, with its gradient still there."""


def adapter_buffers(model):
    """The tensors of an adapter's layers that do not train, such as masks and starts."""
    buffers = []
    for name, buffer in model.named_buffers():
        if ".lora_" in name:
            buffers.append(buffer)
    return buffers


def shaping_of(model, steps=None):
    """The Shaping of the adapter on a model. `steps`: of the phase that decides what is kept; None:
    an earlier phase has decided."""
    for layer in model.modules():
        if not hasattr(layer, "lora_A"):     # no layer of an adapter
            continue
        make = ADAPTERS[layer.kind].shaping
        if make is not None:
            return make(model, steps)
    return Shaping(model, steps)
