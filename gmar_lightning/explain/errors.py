"""What can go wrong when a model is explained, by name."""


class UnsupportedModelError(RuntimeError):
    """The model's picture cannot be derived; the message names what was seen and what can be done."""


class NoPictureError(UnsupportedModelError):
    """The rollout over all layers is not defined; importance and all else per head is."""


class WrongModuleError(UnsupportedModelError):
    """The module that was asked for is not the one to explain; one inside it may be."""


class CutOffError(UnsupportedModelError):
    """The forward cuts the gradient of its attention off, which is right for the training of a linear probe."""


class LiveIteratorError(UnsupportedModelError):
    """The forward draws from something that can be neither rewound nor copied, so a probe would change the run."""
