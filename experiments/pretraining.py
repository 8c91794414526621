"""Does it help to pretrain on the text of the task itself, without its labels?"""

from xformers_lab.experiment import Claim, at_least, compare, reported

CLAIM = Claim(
    says="Masked language modelling on a task's own text, without more data, makes its classifier better.",
    source="Amos, Berant and Gupta, 2024, Never Train from Scratch (arXiv:2310.02980)",
    literature="Long Range Arena: a plain Transformer that is pretrained on each task's own data matches S4, which "
    "beats one from scratch by far",
    doubt="Longer pretraining, which ends here with a quarter of the masked subwords right; several pretraining runs, "
    "where here one serves all seeds.",
    minutes=6,
    data={"sst2": "SST-2's sentences, train.tsv, dev.tsv and test.tsv: sentence, tab, label, no header"},
)
SENTENCES = "path=({data}/sst2):text_column=0:label_column=1:header=false:tokens=bpe:vocab=1024"
MODEL = "position=conv seq_len=48 layers=2 dim=64 heads=2 batch=32 model=encoder"
STUDIES = {
    "masked": compare(f"task=mlm:{SENTENCES} {MODEL} steps=600 lr=4e-3"),
    "classes": compare(f"task=text:{SENTENCES} {MODEL} init=none,{{masked}} steps=150 lr=1e-3"),
}


def judge(tables):
    scratch, pretrained = (tables["classes"].metric(init=init) for init in tables["classes"].all("init"))
    return [
        at_least("pretrained less from scratch: accuracy", pretrained - scratch, 0.01),
        reported("from scratch", scratch),
        reported("pretrained", pretrained),
        reported("masked tokens: accuracy", tables["masked"].metric()),
    ]
