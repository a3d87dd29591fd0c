"""What a method wants of an experiment, as a literal that can be read without importing the method."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Needs:
    """Declared by a method as a class attribute, ``needs = Needs(students=1, strong_views=2)``, literals only.

    Whoever checks a configuration reads it from the source text; whoever builds an experiment makes batches, views and
    networks by it. What is not asked for is not made.

    Attributes:
        students: how many networks it trains as students; 0 takes any number.
        fusion: whether it needs a fusion head over a pair of students.
        unlabelled: whether it needs unlabelled images; without, it is given none unless SAM teaches it.
        strong_views: strong views of every unlabelled image, each with the weak view's geometry.
        plain_labelled: also a view of the labelled images without holes and without a change of light.
        second_labelled: also a second, independent batch of labelled images.
        features: students must have ``encode`` and ``decode``.
        auxiliary: students must have ``auxiliary``: more outputs than one.
        sam: ``guide``: SAM with the prompt generator, one mask a class; ``promptable``: SAM that takes points, boxes
            and masks; None: no SAM.
        spatial_dims: what it works on, 2 for images, 3 for volumes.
        partial_labels: its supervised terms look at ``Batch.valid_classes``, as ``supervised_loss`` does; one that does
            not would teach unlabelled classes as background, and is refused where a source labels some classes only.
    """

    students: int = 0
    fusion: bool = False
    unlabelled: bool = True
    strong_views: int = 1
    plain_labelled: bool = False
    second_labelled: bool = False
    features: bool = False
    auxiliary: bool = False
    sam: Literal["guide", "promptable"] | None = None
    spatial_dims: tuple[int, ...] = (2, 3)
    partial_labels: bool = False

    def __post_init__(self) -> None:
        if self.students < 0 or self.strong_views < 0:
            raise ValueError(
                f"students is {self.students} and strong_views {self.strong_views}; both must be at least 0"
            )
        if self.sam not in (None, "guide", "promptable"):
            raise ValueError(f"sam must be 'guide', 'promptable' or None, got {self.sam!r}")
        if not self.spatial_dims or not set(self.spatial_dims) <= {2, 3}:
            raise ValueError(f"spatial_dims must hold 2, 3 or both, got {self.spatial_dims!r}")

    def taught(self, view: object = "weak") -> "Needs":
        """The same, with SAM as teacher on the unlabelled images.

        Args:
            view: which one SAM sees, ``weak`` or ``strong``; of the latter there is then at least one.
        """
        return replace(self, unlabelled=True, strong_views=max(self.strong_views, int(view == "strong")))
