"""Does a Transformer that has learned SCAN follow longer commands than it was trained on?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="It is near perfect where commands are split at random, and near zero where the test commands are longer.",
    source="Lake and Baroni, 2018 (arXiv:1711.00350), experiments 1 and 2; Csordas et al., 2021 (arXiv:2108.12284)",
    literature="exact match: simple 99.8, length 20.8 (LSTM); Transformer with absolute positions, length 0.00",
    doubt="Relative positions or shared layers that solve the length split: Csordas et al. report 100 % with a "
    "cut-off of 26 actions.",
    minutes=7,
    data={"scan": "SCAN's files, tasks_train_length.txt and so on"},
)
MODEL = "model=encoder_decoder position=rope depth=fixed,universal layers=4 dim=64 batch=32 steps=1000 lr=3e-3"
STUDIES = {
    "simple": compare(f"task=scan:path=({{data}}/scan):split=simple seq_len=58 {MODEL} eval_batches=32"),
    "length": compare(f"task=scan:path=({{data}}/scan):split=length seq_len=34 test_len=58 {MODEL} eval_batches=32"),
}


def judge(tables):
    simple = lambda depth: tables["simple"].metric(depth=depth)
    longer = lambda depth: tables["length"].metric(depth=depth, test_len=58)
    return [
        at_least("simple split: exact match", simple("fixed"), 0.9),
        at_most("length split: exact match", longer("fixed"), 0.15),
        reported("shared layers, simple split", simple("universal")),
        reported("shared layers, length split", longer("universal")),
    ]
