"Text and speech: files that are torn, misplaced or missing. What goes well is shown in nbs/data/01_text and 05_speech."
import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from crossmodal.data.speech import bundled, mfcc, open_speech, read_wav
from crossmodal.data.text import END, PAD, SPECIALS, START, TOKENIZERS, UNKNOWN, Vocabulary, read_word_vectors, shorten, word_vectors

ROWS = np.random.default_rng(0).normal(size=(60, 20))
LINES = [f"word{i} " + " ".join(f"{v:.4f}" for v in row) for i, row in enumerate(ROWS)]
TONE = (.5 * np.sin(np.arange(12_000) / 8)).astype(np.float32)


@pytest.fixture
def glove(tmp_path):
    "A whole file of 60 words of 20 dimensions."
    path = tmp_path / "glove.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


def test_importing_text_and_speech_stays_light():
    code = "import sys, crossmodal.data.speech; print({'librosa', 'sklearn', 'pandas', 'soundfile'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_torn_line_is_named_with_its_columns(glove):
    glove.write_text("\n".join(LINES[:30]) + "\n" + LINES[30][:50])
    with pytest.raises(ValueError, match=r"glove.txt, line 31: expected 21 columns .* found \d+\."):
        read_word_vectors(glove)


def test_binary_word2vec_is_refused(tmp_path):
    path = tmp_path / "vectors.bin"
    path.write_bytes(b"2 20\nred " + bytes(range(80)) + b"\nblue " + bytes(range(80)))
    with pytest.raises(ValueError, match="binary format"):
        read_word_vectors(path)


@pytest.mark.parametrize("keep", [12, 200, -4])
def test_torn_gzip_is_named(tmp_path, keep):
    path = tmp_path / "glove.txt.gz"
    path.write_bytes(gzip.compress("\n".join(LINES).encode())[:keep])
    with pytest.raises(ValueError, match="glove.txt.gz is not a whole gzip file"):
        read_word_vectors(path)


def test_plain_text_named_gz_is_named(tmp_path, glove):
    path = glove.rename(tmp_path / "glove.txt.gz")
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_word_vectors(path)


def test_empty_file_says_how_to_get_one(tmp_path):
    path = tmp_path / "glove.txt"
    path.touch()
    with pytest.raises(ValueError, match="expected at least one word.* found 0.*get GloVe"):
        read_word_vectors(path)


def test_words_with_spaces_or_foreign_breaks_stay_one_word(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("the 1 2\n. . . 3 4\na\x85b\rc 5 6 \n", encoding="utf-8", newline="")
    words, matrix = read_word_vectors(path)
    assert words == ["the", ". . .", "a\x85b\rc"] and matrix.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_projection_does_not_depend_on_compression_or_header(tmp_path, glove):
    zipped, headed = tmp_path / "glove.txt.gz", tmp_path / "word2vec.txt"
    zipped.write_bytes(gzip.compress(glove.read_bytes()))
    headed.write_text("60 20\n" + glove.read_text())
    plain = word_vectors(["word7", "word3"], glove)
    assert plain.shape == (2, 13)
    assert all((word_vectors(["word7", "word3"], file) == plain).all() for file in (zipped, headed))


def test_file_too_small_for_thirteen_dimensions(glove):
    glove.write_text("\n".join(LINES[:5]))
    with pytest.raises(ValueError, match="found 5 words of 20"):
        word_vectors(["word1"], glove)


def test_large_vocabulary_round_trips():
    vocabulary = Vocabulary([f"w{i}" for i in range(30_000)])
    captions, lengths = vocabulary.encode(["w0 w29999", "w5"])
    assert captions.tolist() == [[1, 30_000], [6, PAD]] and lengths.tolist() == [2, 1]
    assert Vocabulary(json.loads(json.dumps(list(vocabulary.words)))) == vocabulary


WORDS = [f"w{i}" for i in range(40)]


@pytest.mark.parametrize("tokenizer", list(TOKENIZERS))
def test_encoding_round_trips_with_every_tokenizer(tokenizer):
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, size=n)) for n in rng.integers(1, 30, size=500)]
    for specials in ((), (UNKNOWN,), (START, END), SPECIALS):
        vocabulary = Vocabulary.build(texts, specials=specials, tokenizer=tokenizer)
        captions, lengths = vocabulary.encode(texts)
        assert vocabulary.decode(captions) == texts
        assert lengths.tolist() == [len(text.split()) + 2 * (START in specials) for text in texts]
        assert ((captions != PAD).sum(1) == lengths).all() and captions.dtype == lengths.dtype == torch.int64
        assert [vocabulary.numbers[word] for word in SPECIALS if word in specials] == list(range(1, len(specials) + 1))


def test_vocabulary_of_no_words_and_encoding_of_no_texts():
    assert len(Vocabulary.build([])) == 1
    captions, lengths = Vocabulary(("red",)).encode([])
    assert captions.shape == (0, 0) and lengths.shape == (0,)


def test_words_do_not_depend_on_the_order_of_texts():
    texts = [f"w{i % 7} w{i % 5} w{i}" for i in range(60)]
    assert Vocabulary.build(texts).words == Vocabulary.build(reversed(texts)).words == Vocabulary.build(iter(texts)).words


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'"red"', b'{"words": null}', b'{"words": ["a"], "tokenizer": ["x"]}',
                                     b'{"words": ["a"], "tokenizer": "letters"}', b'["a", "a"]', b"\xff\xfe\x00", b"null"])
def test_foreign_or_torn_vocabulary_is_named(tmp_path, content):
    path = tmp_path / "vocabulary.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="vocabulary.json is not a whole vocabulary"):
        Vocabulary.load(path)


def test_interrupted_save_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "vocabulary.json"
    Vocabulary(("old",)).save(path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Vocabulary(("new",)).save(path)
    assert Vocabulary.load(path).words == ("old",) and list(tmp_path.iterdir()) == [path]


def test_saved_words_beyond_ascii_come_back(tmp_path):
    vocabulary = Vocabulary(("caf\u00e9", "\u2028", "\U0001f426", "a b"), "spaces")
    vocabulary.save(tmp_path / "v.json")
    assert Vocabulary.load(tmp_path / "v.json") == vocabulary


@pytest.mark.parametrize("how", ["truncate", "subset"])
@pytest.mark.parametrize("most", [2, 5, 18, 40])
def test_shortened_captions_agree_with_a_loop(how, most):
    rng = np.random.default_rng(2)
    vocabulary = Vocabulary.build(WORDS, specials=SPECIALS)
    captions, lengths = vocabulary.encode([" ".join(rng.choice(WORDS, size=n)) for n in rng.integers(1, 30, size=200)])
    short, left = shorten(captions, lengths, most, how, address=(7, torch.arange(200)), always=(1, 2))
    wider, _ = shorten(torch.nn.functional.pad(captions, (0, 9)), lengths, most, how, address=(7, torch.arange(200)), always=(1, 2))
    assert (left == lengths.clamp(max=most)).all() and (wider[:, :short.shape[1]] == short).all()
    for row, length, kept, n in zip(captions.tolist(), lengths.tolist(), short.tolist(), left.tolist()):
        assert kept[0] == 1 and kept[n - 1] == 2 and not any(kept[n:])
        if how == "truncate": assert kept[:n] == (row[:length] if length <= most else [*row[:most - 1], 2])
        rest = iter(row[:length])
        assert all(number in rest for number in kept[:n])          # an ordered subset


def test_shortening_by_epoch_is_fresh_and_repeatable():
    captions, lengths = torch.arange(1, 31).repeat(50, 1), torch.full((50,), 30)
    epochs = [shorten(captions, lengths, 18, "subset", (0, "words", epoch, torch.arange(50)))[0] for epoch in (0, 1, 0)]
    assert epochs[0].equal(epochs[2]) and not (epochs[0] == epochs[1]).all(1).any()
    assert len({tuple(row) for row in epochs[0].tolist()}) == 50


@pytest.mark.parametrize("content, message", [
    (b"", "expected at least 12 bytes of header, found 0"),
    (b"not a sound file at all", "not a sound file that can be read"),
])
def test_foreign_wav_is_named(tmp_path, content, message):
    path = tmp_path / "red_ana_0.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"red_ana_0.wav.*{message}"):
        read_wav(path)


def test_wav_with_a_header_only(tmp_path):
    path = tmp_path / "red_ana_0.wav"
    soundfile.write(path, TONE[:0], 24_000)
    with pytest.raises(ValueError, match="red_ana_0.wav is empty: expected samples"):
        read_wav(path)


def test_wav_from_a_pipe_has_no_length_to_check(tmp_path):
    path = tmp_path / "red_ana_0.wav"
    soundfile.write(path, TONE, 24_000)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff\xff\xff\x7f" + whole[8:])
    assert len(read_wav(path)[0]) == 12_000


def test_sampling_rates_agree():
    fine = np.sin(2 * np.pi * 440 * np.arange(24_000) / 48_000).astype(np.float32)
    assert np.abs(mfcc(fine, 48_000) - mfcc(fine[::2], 24_000))[1:].max() < 5


def test_folder_with_misnamed_recording(tmp_path):
    soundfile.write(tmp_path / "7_ana_0.wav", TONE, 24_000)
    soundfile.write(tmp_path / "red-ana-0.wav", TONE, 24_000)
    with pytest.raises(ValueError, match="red-ana-0.wav is not named as a recording"):
        open_speech(str(tmp_path))


def test_folder_without_recordings_tells_layout_and_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"git clone .*spoken-digit.*\{word\}_\{speaker\}_\{take\}\.wav"):
        open_speech(str(tmp_path))


def test_torn_recording_in_a_folder_is_named(tmp_path):
    soundfile.write(tmp_path / "7_ana_0.wav", TONE, 24_000)
    (tmp_path / "8_ana_0.wav").write_bytes((tmp_path / "7_ana_0.wav").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"8_ana_0.wav is cut off: expected \d+ bytes by its header, found 5000"):
        open_speech(str(tmp_path))


def test_recordings_subfolder_capitals_and_hidden_files(tmp_path, monkeypatch):
    place = tmp_path / "mine" / "recordings"
    place.mkdir(parents=True)
    soundfile.write(place / "Red_Ana_10.WAV", TONE, 24_000)
    soundfile.write(place / "red_Ana_2.wav", TONE, 24_000)
    (place / "._red_Ana_2.wav").write_bytes(b"left by a file manager")
    monkeypatch.setenv("CROSSMODAL_DATA", str(tmp_path))
    mine = open_speech("mine")
    assert (mine.source, mine.words, mine.speakers) == ("mine", ("red", "red"), ("Ana", "Ana"))
    assert mine.with_words_from(bundled()).table(["red"]).equal(mine.vectors[:1])


def test_missing_espeak_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt install espeak-ng.*brew install espeak-ng"):
        open_speech("espeak")
