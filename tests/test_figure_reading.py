"""Mentions and panels of 40 figures that were read by hand.

The figures are 40 of the 257 of the test data, drawn with the seed below. A person read their captions and the text of
their articles in the XML, wrote down how many panels each caption speaks of and which sentences mention the figure, and
compared with the reader's output afterwards. `figure_reading.csv` holds no text: a sentence is a hash of its letters."""
import csv, hashlib, json, random, re
from pathlib import Path

import pytest

from llava_med.core.runs import test_data as data_folder
from llava_med.data.articles import read_article

FOLDER = None if data_folder() is None else data_folder() / 'articles'
READING = list(csv.DictReader(open(Path(__file__).with_name('figure_reading.csv'), encoding='utf-8')))
SEED = 22
# (Evans, Ridgely & Witmer, 2009; Fig. 8) is a figure of that paper; the publisher links it to Figure 8 of this one.
WRONG_LINK = ('peerj_cdata_28figs.xml', 'fig-8', 1)

with_articles = pytest.mark.skipif(
    FOLDER is None or not FOLDER.is_dir(),
    reason='no articles in LLAVA_MED_TESTDATA (default ../shared/data): the reading by hand cannot be compared with them')


def sentence_hash(text):
    "Short hash of a sentence: its first and last letters, without figures, marks and spaces."
    letters = re.sub(r'[\W\d_]+', '', text).lower()
    return hashlib.sha1(f'{letters[:30]} {letters[-30:]}'.encode()).hexdigest()[:10]


def compared(wanted, found):
    "How many hashes agree, are too many, and are missing."
    rest = list(wanted)
    for h in found:
        if h in rest: rest.remove(h)
    return len(wanted) - len(rest), len(found) - (len(wanted) - len(rest)), len(rest)


@pytest.fixture(scope='module')
def figures():
    "Row of the answer key to the record that we make of it."
    key = [json.loads(line) for line in (FOLDER / 'expected.jsonl').read_text(encoding='utf-8').splitlines()]
    out, records = {}, {}
    for r in READING:
        f = r['file']
        if f not in records:
            path = FOLDER / 'xml' / f
            if not path.exists(): path = next((FOLDER / 'packages' / f).glob('*.xml'))
            records[f] = read_article(path)
        out[int(r['row'])] = records[f][int(r['row']) - next(i for i, k in enumerate(key) if k['file'] == f)]
    assert sorted(out) == sorted(random.Random(SEED).sample(range(len(key)), 40))
    return out


@with_articles
def test_the_figures_are_those_that_were_read(figures):
    assert all((figures[int(r['row'])]['fig_id'] or '') == r['fig_id'] for r in READING)


@with_articles
def test_mentions_are_those_of_the_reading(figures):
    right = more = missing = 0
    wrong = []
    for r in READING:
        found = [sentence_hash(m['text']) for m in figures[int(r['row'])]['mentions']]
        a, b, c = compared(r['mentions'].split(), found)
        right, more, missing = right + a, more + b, missing + c
        if b or c: wrong.append((r['file'], r['fig_id'], b + c))
    print(f'{right} mentions right, {more} too many, {missing} missing')
    assert right / (right + missing) >= .95 and right / (right + more) >= .95
    assert wrong == [WRONG_LINK]


@with_articles
def test_panels_are_those_of_the_reading(figures):
    wanted = [int(r['panels']) for r in READING]
    found = [figures[int(r['row'])]['panels'] for r in READING]
    right = sum(map(min, wanted, found))
    print(f'{right} of {sum(wanted)} panels found, {sum(found)} said')
    assert right / sum(wanted) >= .95 and right / sum(found) >= .95
    assert sum(a == b for a, b in zip(wanted, found)) >= 38


def test_the_comparison_can_fail():
    assert compared(['a', 'b'], ['a', 'c']) == (1, 1, 1)
    assert sentence_hash('A mass (Fig. 1).') == sentence_hash('A  mass (Fig.2) ') != sentence_hash('A mass.')
    assert len(READING) == 40 and sum(len(r['mentions'].split()) for r in READING) == 94
