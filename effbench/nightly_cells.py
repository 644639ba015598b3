"""The cells that `effbench gate --times` measures: a task, a backbone and a method at one batch size. No torch.

    batch: 16                              # of cells that do not say
    cells:
      - {task: scenes, backbone: shipped:scenes_vit, method: token_prune:keep=0.5}
      - {task: scenes, backbone: timm:deit_tiny_patch16_224, weights: random, method: baseline, batch: 4}

`baseline` is the model with the library's own attention, `identity` the same on effbench's; anything else is a stack
of methods that need no training.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from effbench.errors import UsageError

MOST_BYTES, MOST_CELLS = 2**20, 200
EXAMPLE = "e.g. cells: [{task: scenes, backbone: shipped:scenes_vit, method: token_prune:keep=0.5, batch: 16}]"


class Cell(BaseModel):
    """One thing whose step time is compared between two code versions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    task: str = Field("scenes", min_length=1, max_length=200)
    backbone: str = Field("shipped:scenes_vit", min_length=1, max_length=200)
    method: str = Field("baseline", min_length=1, max_length=1000)
    batch: int = Field(0, ge=0, le=65536, description="images a step; 0: the file's")
    weights: str = Field("", max_length=1000, description="a file, or random; empty: the backbone's own")

    @property
    def name(self) -> str:
        return f"{self.task} / {self.backbone} / {self.method} / batch {self.batch}"


class CellFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    batch: int = Field(16, ge=1, le=65536)
    cells: list[Cell] = Field(min_length=1, max_length=MOST_CELLS)


def default_cells() -> list[Cell]:
    """Twelve cells: every kind of edit on the shipped tower, and the most used ones on two towers of other shapes.

    Their batches are small: the two steps of a turn are nearer to each other, and more of them fit into a night.
    """
    towers = (
        (
            dict(batch=4),
            ("baseline", "identity", "token_prune:keep=0.5", "token_merge", "quantize", "patch_pool"),
        ),
        (
            dict(backbone="timm:test_vit3", weights="random", batch=4),
            ("baseline", "token_prune:keep=0.5,score=norm,at=2/4/6", "token_merge"),
        ),
        (
            dict(backbone="timm:deit_tiny_patch16_224", weights="random", batch=1),
            ("identity", "token_prune:keep=0.5", "quantize"),
        ),
    )
    return [Cell(method=method, **tower) for tower, methods in towers for method in methods]


def read(path: Path) -> list[Cell]:
    """The cells of a file.

    Raises:
        UsageError: it is missing, no YAML, or not such a file; names the file and what is wrong.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UsageError(f"{path} is larger than {MOST_BYTES // 2**20} MiB", "name a YAML file with cells")
        found = CellFile.model_validate(yaml.safe_load(content.decode()))
    except OSError as error:
        raise UsageError(f"--cells {path} cannot be read: {error.strerror}", "name a YAML file with cells") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        problem = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        raise UsageError(f"--cells {path} is no YAML: {problem}", EXAMPLE) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"--cells {path}: {where}: {first['msg']}", EXAMPLE) from None
    cells = [cell if cell.batch else cell.model_copy(update=dict(batch=found.batch)) for cell in found.cells]
    for index, cell in enumerate(cells):
        if cell in cells[:index]:
            raise UsageError(f"--cells {path}: cells.{index}: {cell.name} stands twice", "name it once")
    return cells
