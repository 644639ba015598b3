"""`effbench.apply`: put a stack of methods on a user's own model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from effbench.method import Method

M = TypeVar("M", bound="nn.Module")


def apply(model: M, spec: str | Method | tuple[Method, ...], calibration: Tensor | Sequence[Any] | None = None) -> M:
    """Edit a timm or OpenCLIP model in place, by a stack of training-free methods.

    Args:
        model: a timm VisionTransformer or an OpenCLIP model with ViT towers, on any device, in float32 or half
            precision. Its attention is replaced by effbench's on the same Parameters (equal to 1e-5 in float32);
            state_dict keys stay the library's.
        spec: e.g. "token_prune:keep=0.7" or "a:x=1+b"; or the methods themselves.
        calibration: what methods that calibrate look at: training images (images, 3, height, width), as the model takes
            them, or a list of tuples of its arguments.

    Returns:
        The same object. It takes the same inputs and gives outputs of the same shape; tokens inside get fewer.

    Raises:
        UsageError: an unknown method or parameter, a method that must be trained, or a model that a method cannot edit.

    Example:
        >>> model = effbench.apply(timm.create_model("deit_tiny_patch16_224", pretrained=True), "token_prune:keep=0.5")
    """
    from effbench.calibration_set import of_inputs
    from effbench.errors import UsageError
    from effbench.method import Method
    from effbench.models.tower import view
    from effbench.spec import canonical, check_stack, parse

    methods = (spec,) if isinstance(spec, Method) else parse(spec) if isinstance(spec, str) else tuple(spec)
    for method in methods:
        if not isinstance(method, Method):
            raise UsageError(f"{method!r} is not a method with its parameters", "pass a spec, or MyMethod(keep=0.5)")
    check_stack(methods)
    for method in methods:
        if method.phase != "test":
            name = canonical((method,))
            raise UsageError(
                f"{name} acts while training (phase={method.phase}), and effbench.apply trains nothing",
                "leave phase= out" if method.natural_phase() == "test" else f"train it: effbench run --method {name}",
            )
    data = of_inputs(calibration)
    seen = view(model)
    for method in methods:
        method.edit_model(seen)
    for method in methods:
        method.finish(seen, data)
    return model
