"""What a method is: a dataclass of parameters with up to four hooks. A method's author reads this file.

    @dataclass(frozen=True)
    class HalfDepth(Method):
        "Keep only the first blocks of the image tower."

        keep: int = param(6, "blocks that stay", low=1)
        source = "illustration"

        def edit_model(self, model):
            model.image.keep_blocks(range(self.keep))

Save it as a file of a package that an entry point of the group `effbench.methods` names; the file's name is
the method's name. `effbench new method NAME` writes such a package.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from effbench.calibration_set import CalibrationSet
    from effbench.models.tower import ModelView

PHASES = ("test", "train", "both")


def param(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A parameter of a method: its default, one line of help, and what values it takes.

    Args:
        default: value when the spec names none; a list is a tuple (`at=3/6/9` is `(3, 6, 9)`).
        help: one line.
        low, high: inclusive bounds; `above` is an exclusive lower bound. On a tuple they hold for every element.
        choices: the allowed values.
    """
    return field(default=default, metadata=dict(help=help, low=low, high=high, above=above, choices=choices))


@dataclass
class TrainingPlan:
    """What an arm trains.

    Args:
        model: the view of the model, edited already.
        frozen: modules and parameters that are not trained (with `--train locked` the image tower).
        trained: those inside frozen ones that are trained all the same, e.g. a method's own scorer.
        each_step: called before every training step with the share of the steps that is done, in [0, 1): schedules.
        losses: called after the forward pass of every training step; the scalars are added to the task's loss.
        plain_engine: why no other engine than the plain one can train this; empty where all can.
    """

    model: ModelView
    frozen: list[nn.Module | nn.Parameter]
    trained: list[nn.Module | nn.Parameter]
    each_step: list[Callable[[float], None]] = field(default_factory=list)
    losses: list[Callable[[], Tensor]] = field(default_factory=list)
    plain_engine: str = ""

    def set_gradients(self) -> None:
        """Let the parameters of the model require gradients, or not, as the plan says."""
        for parts, trained in ((self.frozen, False), (self.trained, True)):
            for part in parts:
                part.requires_grad_(trained)

    def freezes_all_of(self, module: nn.Module) -> bool:
        """Whether no parameter of a module is trained."""
        self.set_gradients()
        return not any(p.requires_grad for p in module.parameters())


@dataclass(frozen=True)
class Method:
    """One efficiency method with typed parameters. Subclass it, as a frozen dataclass, in a file of its own.

    Class attributes:
        source: where the algorithm is published (paper, arXiv id).
        conflicts: names of methods that cannot stand in the same stack.
        goes_before: names of methods that must stand to the right of this one in a stack.
        default_phase: "test" (applied after training to the baseline's own weights: the default of a training-free
            method), "train" (only while training) or "both". A user overrides it with `phase=`.
        phases: the phases that the method supports.
        claims: what a reader must expect: "tokens" (it removes tokens: checked against the tensors at run time),
            "per image" (how many depends on the image: FLOPs are counted image by image), "per batch" (the work
            depends on what stands together in a batch: FLOPs are counted on the batch that is timed), "random" (what
            it gives in testing is drawn), "neighbours" (what an image gets depends a little on the images beside it).
        neutral: values of parameters with which the outputs are the baseline's, e.g. {"keep": 1.0}; {} where they
            always are; None where there are none. `effbench check` looks.
    """

    source: ClassVar[str] = ""
    conflicts: ClassVar[tuple[str, ...]] = ()
    goes_before: ClassVar[tuple[str, ...]] = ()
    claims: ClassVar[tuple[str, ...]] = ()
    default_phase: ClassVar[str] = "test"
    phases: ClassVar[tuple[str, ...]] = PHASES
    neutral: ClassVar[dict[str, Any] | None] = None

    phase: str = field(default="", kw_only=True, metadata=dict(help="when it acts"))

    def __post_init__(self) -> None:
        from effbench.spec import check_parameters

        if not self.phase:
            object.__setattr__(self, "phase", self.natural_phase())
        check_parameters(self)

    def natural_phase(self) -> str:
        """The phase where the user names none; it may depend on the parameters."""
        return self.default_phase

    def edit_model(self, model: ModelView) -> None:
        """Change the model's structure in place: prune tokens after block k, swap the attention, drop layers.

        Args:
            model: the view of the model; `model.image` and `model.text` are towers (or None).

        Raises:
            UsageError: the model lacks what the method needs; say what it is and name the alternative.
        """

    def settle(self, model: ModelView, calibration: CalibrationSet) -> Method:
        """The same method with every choice that depends on the data made: `by=gradient` becomes `at=3/7/11`.

        Asked once per seed, before training, of a method that acts while training; the time it takes is charged to the
        arm's training. The hooks below are called on what it returns.

        Args:
            model: the view of a fresh model, as the methods before this one left it. It is thrown away afterwards.
            calibration: training data.
        """
        return self

    def edit_training(self, plan: TrainingPlan) -> None:
        """Change what is trained, in place on the plan. Called after `edit_model`, before training."""

    def finish(self, model: ModelView, calibration: CalibrationSet) -> None:
        """Change the trained model in place: quantise, prune channels, remove layers.

        Args:
            model: the view of the trained model.
            calibration: training data.

        Raises:
            UsageError: the model or the machine lacks what the method needs; say what and name the alternative.
        """

    def controls(self) -> dict[str, Method]:
        """Blind stand-ins with the same token budget, by name ("random", "grid", "norm"), of which a run takes those
        that it is asked for; empty for a method that has no tokens to choose."""
        return {}

    def notes(self, model: ModelView) -> list[str]:
        """What a reader must know of this arm, e.g. which of several paths was taken; asked after a test step."""
        return []

    def no_quality(self, model: ModelView) -> str:
        """Why this arm's quality means nothing, so that only its FLOPs and times are shown; empty where it does."""
        return ""

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """The declared parameters by name, as dataclass fields (`.default`, `.type`, `.metadata`)."""
        own = {f.name: f for f in fields(cls) if f.name != "phase"}
        return own | {f.name: f for f in fields(cls) if f.name == "phase"}
