"""Where the course report's model comes from: patches and a linear layer, trained from scratch."""

from __future__ import annotations

from torch import nn

from effbench.errors import UsageError
from effbench.models.backbones import Backbone
from effbench_tasks.course.model import PATCH

SIZE = 112


class CoursePatches(Backbone):
    """The course report's 16 x 16 patches and one linear layer, untrained: course:patches, for its task alone."""

    family = "course"
    #: ImageNet's, as most pipelines have; what the report did is not known
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, name, weights=None, pretrained=None, image_size=None, single_use=False):
        if name != "patches":
            raise UsageError(f"the family course has no model named {name!r}", "write course:patches")
        if pretrained is not None or weights not in (None, "random"):
            raise UsageError("course:patches is trained from scratch", "leave --weights and --pretrained out")
        super().__init__(name, "random", None, image_size, single_use)

    def _create(self, name, weights, pretrained, size):
        self.image_size = size or SIZE
        if self.image_size % PATCH:
            raise UsageError(
                f"course:patches cuts patches of {PATCH} pixels, which do not fit {size}",
                f"choose a multiple of {PATCH}, or leave --image-size out for the report's {SIZE}",
            )
        return nn.Identity()  # the layers are made by the task, under the seed of the arm

    def dual_encoder(self, protocol, vocabulary):
        raise UsageError("course:patches has no towers", "it serves --task course_report alone")
