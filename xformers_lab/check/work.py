"""What a worker does for check: finds a choice, runs the kit of its shelf on it."""

from xformers_lab import spec
from xformers_lab.errors import UsageError, missing_device
from xformers_lab.supervise.worker import Tell


def find(tell: Tell, word: str) -> list[tuple[str, str]]:
    """The choices that a word of `xlab check` names, each with its shelf; raises UsageError where there is none."""
    tell.doing(f"importing {word}")
    choices = [(word, name) for name in spec.names(word)] if word in spec.SHELVES else [spec.home(word)]
    for shelf, name in choices:
        spec.resolve(shelf, name)  # a misspelt name is found before the kit runs
    return choices


def kit(tell: Tell, shelf: str, choice: str, deep: bool) -> dict:
    """The kit's report on a choice. One that ends the process leaves no older verdict to be believed."""
    tell.doing(f"checking {choice}")
    if reason := missing_device():
        raise UsageError(reason)
    from xformers_lab.check import cache, run

    if shelf == "attention":
        cache.forget(choice)
    report = run.check(choice, shelf, deep=deep, doing=lambda words: tell.doing(f"checking {words}")).to_dict()
    return cache.keep(choice, report) if shelf == "attention" else report
