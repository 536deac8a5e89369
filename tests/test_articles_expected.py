"""Every figure of the real articles against a key that was read straight from their XML, field by field."""
import json
from collections import defaultdict

import pytest

from llava_med import articles as A
from llava_med.runs import test_data as data_folder

FOLDER = None if data_folder() is None else data_folder() / 'articles'
pytestmark = pytest.mark.skipif(FOLDER is None or not FOLDER.is_dir(),
                                reason='no articles in LLAVA_MED_TESTDATA (default ../shared/data): there is nothing to compare with')

GLUED = 'the XML has no white space between the title and the paragraph of the caption; the key glues them together, we put a space'
NO_PREFIX = 'the file never binds the prefix xlink, so that the key found no hrefs; the recovered attributes name these files'
# (article, field) → figures that differ, and why. Every other figure of every article must agree.
DIFFERENCES = {
    ('elife-30274-v1', 'caption'): (['fig2', 'fig2s1', 'fig2s2', 'fig3'], GLUED),
    ('plosone-0178565', 'caption'): (['pone.0178565.g003', 'pone.0178565.g006'], GLUED),
    ('PMC3460867_pone.0046493.nxml', 'caption'): ([f'pone-0046493-g00{i}' for i in (1, 2, 3, 4)], GLUED),
    ('PMC5828200.nxml', 'caption'): (['F9', 'F11'], GLUED),
    ('PMC7289599_elife-56337.nxml', 'caption'): (['fig1', 'fig1s1', 'fig1s2', 'fig1s3', 'fig2', 'fig4', 'fig4s3'], GLUED),
    ('PMC7302504_pone.0234687.nxml', 'caption'): (['pone.0234687.g003'], GLUED),
    ('encoda_fig_malformed.xml', 'graphics'): (['f1', 'f8', 'f1', 'f3', 'fig6'], NO_PREFIX),
}


@pytest.fixture(scope='module')
def key():
    rows = defaultdict(list)
    for line in (FOLDER/'expected.jsonl').read_text(encoding='utf-8').splitlines():
        row = json.loads(line)
        rows[row['file']].append(row)
    return dict(rows)


@pytest.fixture(scope='module')
def ours():
    rows = defaultdict(list)
    for r in A.read_articles([FOLDER/'xml', FOLDER/'packages'], lambda *problem: None):
        parts = r['source'].split('/')
        rows[parts[-2] if parts[-3] == 'packages' else parts[-1]].append(r)
    return dict(rows)


def compared(want, got):
    "The fields of one figure, ours beside the key's."
    first = want['caption_starts'].split()
    return dict(fig_id=(want['fig_id'], got['fig_id']),
                label=((want['label'] or '').rstrip('.'), got['label'] or ''),
                caption=(first, got['caption'].split()[:len(first)] if first else got['caption'].split()),
                graphics=(want['graphics'], got['graphics']),
                mentions=(True, bool(got['mentions']) or not want['xrefs']),
                sub_article=(want['sub_article'], got['sub_article']))


def test_the_same_figures_in_the_same_order(key, ours):
    assert sum(map(len, key.values())) == 257
    assert {k: len(v) for k, v in ours.items()} == {k: len(v) for k, v in key.items()}


def test_figures_agree_but_for_the_explained_differences(key, ours):
    found = defaultdict(list)
    for name, rows in key.items():
        for want, got in zip(rows, ours[name], strict=True):
            for field, (theirs, mine) in compared(want, got).items():
                if theirs != mine: found[name, field].append(want['fig_id'])
    assert dict(found) == {k: figs for k, (figs, why) in DIFFERENCES.items()}


def test_glued_captions_differ_by_a_space_only(key, ours):
    for (name, field), (figs, why) in DIFFERENCES.items():
        for want, got in zip(key[name], ours[name]):
            if why != GLUED or want['fig_id'] not in figs: continue
            first = want['caption_starts'].replace(' ', '')
            assert got['caption'].replace(' ', '').startswith(first)


def test_a_cross_reference_is_a_mention_by_cross_reference(key, ours):
    "The key counts references to a figure's own id; figures without id are reached through their group."
    for name, rows in key.items():
        for want, got in zip(rows, ours[name]):
            linked = any(m['xref'] for m in got['mentions'])
            assert linked == bool(want['xrefs']) or want['fig_id'] is None and want['fig_group'], (name, want)
