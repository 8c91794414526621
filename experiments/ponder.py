"""Does a Universal Transformer ponder longer over questions that rest on more facts?"""

from xformers_lab.experiment import Claim, at_least, compare, reported

CLAIM = Claim(
    says="With adaptive computation time positions take more steps where an answer rests on two facts than on one.",
    source="Dehghani et al., 2019, Universal Transformers (arXiv:1807.03819), section 3.1",
    literature="bAbI, all tasks in one model, steps of a position: 2.3 ± 0.8 for one supporting fact, 3.1 ± 1.1 for "
    "two, 3.8 ± 2.2 for three",
    doubt="A position for each sentence, as the paper has them, in place of each word; one model of both tasks, "
    "longer training, or task 3, whose stories are far longer.",
    minutes=10,
    data={"babi_en10k": "bAbI's published files of tasks 1 and 2, en-10k"},
)
STUDIES = {
    f"facts_{number}": compare(
        f"task=babi:path=({{data}}/babi_en10k):number={number} model=decoder depth=universal:act=true:ponder=0.001 "
        "position=rope seq_len=96 dim=64 layers=4 heads=2 batch=32 steps=1200 lr=2e-3"
    )
    for number in (1, 2)
}


def judge(tables):
    steps = {number: tables[f"facts_{number}"].reports("steps") for number in (1, 2)}
    accuracy = {number: tables[f"facts_{number}"].metric() for number in (1, 2)}
    return [
        at_least("steps for two facts less those for one", steps[2] - steps[1], 0),
        at_least("one fact: accuracy", accuracy[1], 0.9),
        *(reported(f"{number} facts: steps", steps[number]) for number in (1, 2)),
        reported("two facts: accuracy", accuracy[2]),
    ]
