"""Caption metrics against pycocoevalcap, given the same words, and what happens when a Java program misbehaves."""

import os
import random
import shutil
import signal
import stat
import subprocess
import threading
import time

import numpy as np
import pytest
import torch

from crossmodal.data.text import Vocabulary
from crossmodal.metrics import captions
from crossmodal.metrics.captions import CiderD, DocumentFrequency, caption_scores, from_counts, meteor, spice, split_captions

pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
from pycocoevalcap.bleu.bleu import Bleu  # noqa: E402
from pycocoevalcap.cider.cider import Cider  # noqa: E402
from pycocoevalcap.cider.cider_scorer import CiderScorer  # noqa: E402
from pycocoevalcap.rouge.rouge import Rouge  # noqa: E402

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java on this machine: METEOR and the PTB tokenizer are not tested")


def speech(rng: random.Random, words: int, longest: int) -> str:
    return " ".join(f"w{min(int(rng.paretovariate(.6)), words)}" for _ in range(rng.randint(1, longest)))


def corpus(seed: int, n: int = 40, references: int = 5, words: int = 300, longest: int = 14):
    rng = random.Random(seed)
    judges = [[speech(rng, words, longest) for _ in range(rng.randint(1, references))] for _ in range(n)]
    mixed = lambda text: " ".join(word if rng.random() < .7 else speech(rng, words, 1) for word in text.split())
    return [mixed(rng.choice(texts)) for texts in judges], judges


ADVERSARIAL = {
    "random": corpus(0), "many words": corpus(1, words=10**6), "two words": corpus(2, words=2), "one reference": corpus(3, references=1),
    "one picture": (["a red bird sits"], [["a red bird sits", "a bird"]]),
    "identical": ([f"this is caption number {k}" for k in range(9)], [[f"this is caption number {k}"] * 3 for k in range(9)]),
    "same caption everywhere": (["a red bird"] * 5, [["a red bird", "a bird"]] * 5),
    "empty hypotheses": (["", "a bird", ""], [["a bird", "birds"], ["a bird"], ["x y z"]]),
    "empty references": (["a bird", "", "b"], [["", "a bird"], [""], ["", ""]]),
    "all empty": (["", ""], [[""], ["", ""]]),
    "one word": (["bird", "fish", "a"], [["bird"], ["bird", "fish fish"], ["a a a a a"]]),
    "nothing shared": (["a b c d e", "f g h i j"], [["k l m n o"], ["p q r s t"]]),
    "repeats": (["the " * 30, "a b " * 20], [["the cat sat on the mat", "the the"], ["a b a b a c", "b a"]]),
    "ten thousand words": ([" ".join(f"w{k % 7000}" for k in range(10000)), "w1 w2"], [[" ".join(f"w{k % 31}" for k in range(300)), "w1 w2 w3"], ["w2 w1"]]),
    "unicode": (["der Vögel größe 鳥 が 飛ぶ", "é é ́ 🐦"], [["Vögel 鳥 が", "größe"], ["é é 🐦 🐦", "🐦"]]),
    "closest length tie": (["a b c"], [["a b", "a b c d"]]),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_equal_given_the_same_words(name):
    said, judges = ADVERSARIAL[name]
    said, judges = [" ".join(text.split()) for text in said], [[" ".join(text.split()) for text in texts] for texts in judges]
    ours = caption_scores([text.split() for text in said], [[text.split() for text in texts] for texts in judges])
    results, sources = dict(enumerate([text] for text in said)), dict(enumerate(judges))
    whole, each = Bleu().compute_score(sources, results, verbose=0)
    np.testing.assert_allclose([ours[f"BLEU-{k}"] for k in range(1, 5)], whole, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose([ours.each[f"BLEU-{k}"] for k in range(1, 5)], each, rtol=1e-9, atol=1e-12)
    if name == "all empty": cider, each = 0., [0., 0.]     # the peer stops with "max() arg is an empty sequence"
    else: cider, each = Cider().compute_score(sources, results)
    np.testing.assert_allclose([ours["CIDEr"], *ours.each["CIDEr"]], [cider, *each], rtol=1e-9, atol=1e-9)
    if name != "ten thousand words":                    # the peer's table would have 70 million cells, in Python
        rouge, each = Rouge().compute_score(sources, results)
        np.testing.assert_allclose([ours["ROUGE-L"], *ours.each["ROUGE-L"]], [rouge, *each], rtol=1e-9, atol=1e-12)
    assert np.isfinite(list(ours.values())).all()


def test_rouge_of_long_captions():
    said, judges = corpus(7, n=6, longest=200, words=40)
    ours = captions.rouge_l([text.split() for text in said], [[text.split() for text in texts] for texts in judges])
    np.testing.assert_allclose(ours, Rouge().compute_score(dict(enumerate(judges)), {k: [text] for k, text in enumerate(said)})[1], rtol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_numpy_and_compiled_agree(name, plain, monkeypatch):
    said, judges = ADVERSARIAL[name]
    scorer = CiderD(judges, tokenizer="spaces")
    compiled = scorer.score(said, plain=plain)
    monkeypatch.setattr(captions, "_dots", lambda: captions._search)
    np.testing.assert_allclose(scorer.score(said, plain=plain), compiled, rtol=1e-12, atol=1e-14)


def test_without_numba_one_warning_and_the_same_scores(monkeypatch):
    said, judges = corpus(4)
    expected = CiderD(judges).score(said)
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    captions._dots.cache_clear()
    try:
        with pytest.warns(UserWarning, match="numba") as warned: first = CiderD(judges).score(said)
        np.testing.assert_allclose(first, expected, rtol=1e-12)
        CiderD(judges).score(said)
        assert len(warned) == 1
    finally: captions._dots.cache_clear()


def plain_cider(said, judges):
    "CIDEr as its paper's equations 1 to 3 say, word by word."
    from collections import Counter
    from math import log
    grams = lambda text, n: Counter(zip(*(text.split()[k:] for k in range(n))))
    scores = []
    for text, texts in zip(said, judges):
        total = 0.
        for n in range(1, 5):
            df = Counter(gram for others in judges for gram in {gram for other in others for gram in grams(other, n)})
            vector = lambda caption, n=n, df=df: {gram: times * (log(len(judges)) - log(max(1, df[gram]))) for gram, times in grams(caption, n).items()}
            norm = lambda v: sum(x * x for x in v.values())**.5
            mine = vector(text)
            for other in texts:
                theirs = vector(other)
                if norm(mine) and norm(theirs): total += sum(x * theirs.get(gram, 0) for gram, x in mine.items()) / norm(mine) / norm(theirs) / len(texts)
        scores.append(total / 4 * 10)
    return scores


def test_plain_cider():
    said, judges = corpus(5, n=12)
    np.testing.assert_allclose(CiderD(judges, tokenizer="spaces").score(said, plain=True), plain_cider(said, judges), rtol=1e-9)


# ---- as a reward

def as_text(rows) -> list[str]:
    "Self-critical training's way from numbers to text: up to the first 0, and with it."
    texts = []
    for row in rows:
        row = list(map(str, row))
        texts.append(" ".join(row[:row.index("0") + 1] if "0" in row else row))
    return texts


def peer_rewards(hypotheses, references, frequency=None, pictures=0):
    scorer = CiderScorer()
    for said, texts in zip(hypotheses, references): scorer += (said, texts)
    if frequency is None: return scorer.compute_score()[1]
    scorer.document_frequency.update(frequency)
    for _ in range(pictures - len(references)): scorer += ("", [""])         # the peer takes N from the number of references
    return np.array(scorer.compute_cider())[:len(references)]


def sampled_corpus(seed=0, n=30, most=27012, steps=16):
    rng = np.random.default_rng(seed)
    draw = lambda: np.minimum(rng.zipf(1.3, size=rng.integers(1, steps)), most)
    references = [[draw().tolist() for _ in range(5)] for _ in range(n)]
    rows = np.zeros((2 * n, steps), dtype=np.int64)
    for i in range(2 * n):
        words = np.where(rng.random(steps) < .6, np.resize(references[i % n][0], steps), np.minimum(rng.zipf(1.3, size=steps), most))
        length = steps if i % 7 == 0 else rng.integers(0, steps)        # some never end, some are empty
        rows[i, :length] = words[:length]
    return rows, references


@pytest.mark.parametrize("most", [5, 27012, 2**31 - 1])
@pytest.mark.parametrize("form", [np.asarray, torch.as_tensor, lambda rows: torch.as_tensor(rows, dtype=torch.int32)])
def test_self_critical_reward(form, most):
    rows, references = sampled_corpus(most=most)
    items = np.tile(np.arange(30), 2)
    ours = CiderD(references, end=True).score(form(rows), items=items)
    judges = [as_text([[*words, 0] for words in texts]) for texts in references]
    halves = [peer_rewards(as_text(half), judges) for half in (rows[:30], rows[30:])]
    np.testing.assert_allclose(ours, np.concatenate(halves), rtol=1e-9, atol=1e-12)


def test_one_call_is_many_calls():
    rows, references = sampled_corpus(1)
    scorer = CiderD(references)
    together = scorer.score(rows, items=np.tile(np.arange(30), 2))
    np.testing.assert_allclose(together, [scorer.score(rows[i:i + 1], items=[i % 30])[0] for i in range(60)], rtol=1e-12)
    np.testing.assert_array_equal(together, scorer.score(rows, items=torch.arange(30).repeat(2)))       # scoring leaves no trace
    assert len(scorer.score(rows[:0], items=[])) == 0


def test_a_vocabulary_joins_texts_and_numbers():
    said, judges = corpus(6)
    texts = [text for captions in judges for text in captions] + said
    everything = Vocabulary.build(texts, specials=("<start>", "<end>"))
    rows, _ = everything.encode(said)
    np.testing.assert_allclose(CiderD(judges, everything).score(rows), CiderD(judges).score(said), rtol=1e-12)
    few = Vocabulary.build(texts, specials=("<start>", "<end>", "<unk>"), most=20)
    rows, _ = few.encode(said)
    shorn = lambda text: " ".join(word if word in few.numbers else "unk" for word in text.split())
    spelled = CiderD([[shorn(text) for text in captions] for captions in judges])
    np.testing.assert_allclose(CiderD(judges, few).score(rows), spelled.score([shorn(text) for text in said]), rtol=1e-12)


@pytest.mark.parametrize("wrong, word", [
    (dict(hypotheses="a bird", references=[["a"]]), "list with one entry"), (dict(hypotheses=["a"], references=["a bird"]), "list of captions"),
    (dict(hypotheses=["a"], references=[[]]), "at least one caption"), (dict(hypotheses=[], references=[]), "at least one picture"),
    (dict(hypotheses=[float("nan")], references=[["a"]]), "texts everywhere"), (dict(hypotheses=[None], references=[["a"]]), "texts everywhere"),
    (dict(hypotheses={1: ["a"]}, references={1: ["a"]}), "list with one entry"), (dict(hypotheses=["a"], references=[[["a"]]]), "texts everywhere"),
])
def test_what_is_no_caption_is_refused(wrong, word):
    with pytest.raises(ValueError, match=word): caption_scores(**wrong)


@pytest.mark.parametrize("rows, word", [
    (torch.full((1, 3), float("nan")), "integers"), (np.ones((1, 3)), "integers"), (np.ones(3, dtype=int), "shape"), (np.array([[-1, 2]]), "-1"),
    (np.array([[True]]), "integers"), (["a bird"], "one form"), ([[1.5]], "1.5")])
def test_what_is_no_sample_is_refused(rows, word):
    with pytest.raises(ValueError, match=word): CiderD([[[1, 2]]]).score(rows)


def test_stored_frequencies(tmp_path):
    _, training = sampled_corpus(2, n=80)
    rows, references = sampled_corpus(3)
    CiderD(training, end=True).document_frequency.save(tmp_path / "df.npz")
    stored = DocumentFrequency.load(tmp_path / "df.npz")
    counts = {}
    for texts in training:
        for gram in {gram for text in as_text([[*words, 0] for words in texts]) for n in range(1, 5) for gram in zip(*(text.split()[k:] for k in range(n)))}:
            counts[gram] = counts.get(gram, 0) + 1
    judges = [as_text([[*words, 0] for words in texts]) for texts in references]
    expected = peer_rewards(as_text(rows[:30]), judges, counts, 80)
    for frequency in (stored, tmp_path / "df.npz", str(tmp_path / "df.npz"), from_counts(counts, 80, numbers=True, end=True)):
        np.testing.assert_allclose(CiderD(references, end=True, document_frequency=frequency).score(rows[:30]), expected, rtol=1e-9, atol=1e-12)
    np.savez(tmp_path / "other.npz", x=1)
    with pytest.raises(ValueError, match="no document frequencies"): DocumentFrequency.load(tmp_path / "other.npz")


# ---- Java

def pretend_java(folder, script: str, monkeypatch):
    "A `java` that does what the script says."
    path = folder / "java"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


PAIR = ([["a", "bird"]], [[["a", "bird"]]])
VERSION = 'if [ "$1" = -version ]; then echo "openjdk version \\"1.6.0\\"" >&2; exit 0; fi\n'


def test_no_java_is_said_first(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for metric in ("METEOR", "SPICE"):
        with pytest.raises(FileNotFoundError, match=f"{metric} is a Java program.*Install a Java"): caption_scores(["a"], [["a"]], metrics=[metric])
    with pytest.raises(FileNotFoundError, match="PTB tokenizer is a Java program"): caption_scores(["a"], [["a"]], tokenizer="ptb")


def test_a_java_that_cannot_run_it(monkeypatch, tmp_path):
    pretend_java(tmp_path, VERSION + "echo UnsupportedClassVersionError >&2; exit 1", monkeypatch)
    with pytest.raises(RuntimeError, match="(?s)died twice under openjdk version \"1.6.0\".*UnsupportedClassVersionError"): meteor([PAIR])


def test_one_death_is_survived(monkeypatch, tmp_path):
    pretend_java(tmp_path, f"""if [ ! -e {tmp_path}/once ]; then touch {tmp_path}/once; read line; kill -9 $$; fi
while read line; do case "$line" in SCORE*) echo 1.0 2.0;; EVAL*) echo 0.5; echo 0.25;; esac; done""", monkeypatch)
    [(score, each)] = meteor([PAIR], limit=20)
    assert (score, each.tolist()) == (.25, [.5])


def test_half_an_answer_and_words_are_deaths(monkeypatch, tmp_path):
    for answer in ("printf 0.5", "echo 0,5; echo 0,5"):
        pretend_java(tmp_path, VERSION + f"""while read line; do case "$line" in SCORE*) echo 1;; EVAL*) {answer}; exit;; esac; done""", monkeypatch)
        with pytest.raises(RuntimeError, match="died twice"): meteor([PAIR], limit=20)


def test_silence_ends_at_the_limit(monkeypatch, tmp_path):
    pretend_java(tmp_path, "exec sleep 60", monkeypatch)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="within 1 s"): meteor([PAIR], limit=1)
    with pytest.raises(TimeoutError, match="within 1 s"): captions._ptb(["a bird"], limit=1)
    assert time.monotonic() - start < 50


def test_much_on_stderr_does_not_block(monkeypatch, tmp_path):
    pretend_java(tmp_path, """head -c 1000000 /dev/zero >&2
while read line; do case "$line" in SCORE*) echo 1;; EVAL*) echo 1; echo 1;; esac; done""", monkeypatch)
    assert meteor([PAIR], limit=20)[0][0] == 1


def test_separators_and_what_is_sent(monkeypatch, tmp_path):
    pretend_java(tmp_path, f"""while read -r line; do echo "$line" >> {tmp_path}/heard; case "$line" in SCORE*) echo 1;; EVAL*) echo 1; echo 1;; esac; done""",
                 monkeypatch)
    meteor([([["a", "|||", "b|||c"]], [[["|||", "x"], ["y"]]])], limit=20)
    assert (tmp_path / "heard").read_text().splitlines()[0] == "SCORE ||| x ||| y ||| a bc"


def test_spice_says_what_is_missing_and_reads_its_answer(monkeypatch, tmp_path):
    pretend_java(tmp_path, """while [ $# -gt 0 ]; do if [ "$1" = -out ]; then out=$2; fi; shift; done
echo '[{"image_id": 1, "scores": {"All": {"f": null}}}, {"image_id": 0, "scores": {"All": {"f": 0.5}}}]' > $out""", monkeypatch)
    lib = captions.program("spice", "spice-1.0.jar").parent / "lib"
    if not (lib / captions.CORENLP[0]).exists():
        with pytest.raises(FileNotFoundError, match="stanford-corenlp-3.6.0.jar.*get_stanford_models"): spice(*PAIR)
    monkeypatch.setattr(captions, "CORENLP", ())
    assert spice(PAIR[0] * 2, PAIR[1] * 2).tolist() == [.5, 0.]


@needs_java
def test_ptb_tokenizer_equals_coco_caption():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    texts = ["The bird's bill isn't red, it's orange-yellow.", "", "A man (left) rides; two 1/2 \"horses\"...", "|||", "One  two", "U.S. $5.50 e-mail!", ""]
    theirs = PTBTokenizer().tokenize({0: [{"caption": text} for text in texts]})[0]
    assert [" ".join(words) for words in split_captions(texts, "ptb")[0]] == [" ".join(text.split()) for text in theirs]
    assert split_captions(["two\nlines", "caf\u00e9 \u9ce5", "a\u2028b\x85c"], "ptb")[0] == [["two", "lines"], ["caf\u00e9", "\u9ce5"], ["a", "b", "c"]]


@needs_java
def test_meteor_equals_coco_caption_even_in_german(monkeypatch):
    from pycocoevalcap.meteor.meteor import Meteor
    said = ["a red bird sits on branches", "", "two men are riding", "x"]
    judges = [["a red bird is sitting on a branch", "birds"], ["a"], ["two people ride"], ["y"]]
    peer = Meteor()                                                                         # loads its tables while ours loads them
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")         # decimal commas everywhere
    ours = caption_scores([text.split() for text in said], [[text.split() for text in texts] for texts in judges], metrics=["METEOR"])
    expected, each = peer.compute_score(dict(enumerate(judges)), {k: [text] for k, text in enumerate(said)})
    np.testing.assert_allclose([ours["METEOR"], *ours.each["METEOR"]], [expected, *each], atol=1e-12)
    assert 0 <= ours.chance["METEOR"] < ours["METEOR"]


@needs_java
def test_meteor_survives_kill(monkeypatch):
    "kill -9 of the child that this test started, twice: an error, at once."
    born, start_child = [], subprocess.Popen

    def started(*args, **options):
        child = start_child(*args, **options)
        if "-jar" in args[0]:
            born.append(child)
            os.kill(child.pid, signal.SIGSTOP)          # it answers nothing before it dies
            threading.Timer(.3, os.kill, (child.pid, signal.SIGKILL)).start()
        return child

    monkeypatch.setattr(subprocess, "Popen", started)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="METEOR died twice under .*exit status -9"): meteor([PAIR], limit=60)
    assert len(born) == 2 and all(child.poll() == -9 for child in born) and time.monotonic() - start < 55
