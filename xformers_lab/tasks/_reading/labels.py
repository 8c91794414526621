"""Which classes there are: labels that only held-out data have, and those that may mean that there is none."""

from collections.abc import Hashable, Mapping, Sequence

from xformers_lab.errors import UsageError
from xformers_lab.tasks import Split
from xformers_lab.tasks._reading.layout import listed

# What benchmarks put for the labels of a test split that they keep secret.
HIDDEN = -1


def check_known(task: str, source: str, labels: Mapping[Split | None, Sequence[Hashable]]) -> None:
    """Raises UsageError where held-out data have labels that no train data have."""
    if "train" not in labels:
        return
    trained = set(labels["train"])
    for split, of_split in labels.items():
        if unknown := sorted({str(label) for label in of_split if label not in trained}):
            rows = sum(label not in trained for label in of_split)
            raise UsageError(
                f"{task}: {source}: the {split} data have labels that the train data lack, in {rows:,} rows: "
                f"{listed(unknown)}: mend them, or leave these rows out"
            )


def warnings(labels: Mapping[Split | None, Sequence[Hashable]]) -> list[str]:
    """A line for each part of which some rows, not all, have the label -1."""
    lines = []
    for split, of_split in labels.items():
        hidden = sum(str(label) == str(HIDDEN) for label in of_split)
        if 0 < hidden < len(of_split):
            lines.append(
                f"warning: label -1 in {hidden:,} of {len(of_split):,} rows{f' of {split}' if split else ''}: it is "
                "read as a class; where it means that there is no label, leave these rows out"
            )
    return lines
