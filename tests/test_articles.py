"""Real articles against an answer key that was read straight from their XML."""
import json, re, time
from collections import Counter, defaultdict

import pandas as pd
import pytest
from lxml import etree

from llava_med.data import articles as A
from llava_med.core.runs import test_data as data_folder

FOLDER = None if data_folder() is None else data_folder() / 'articles'
pytestmark = pytest.mark.skipif(FOLDER is None or not FOLDER.is_dir(),
                                reason='no articles in LLAVA_MED_TESTDATA (default ../shared/data): there is nothing to compare with')

# Captions of these articles contain source-data files with captions of their own; the key counts their words too.
WITH_DATA = {'elife-46472-v3', 'elife-30274-v1', 'PMC7289599_elife-56337.nxml',
             'elife_kitchen_sink.xml'}
IN_FORMULAS = 'PMC6849754_math_in_all_captions.xml'   # the key counts each sign of a formula as a word
# This file binds no xlink prefix; its answer key holds no hrefs for these figures. We read them all the same.
RECOVERED = 'encoda_fig_malformed.xml'


GLUED = 'the XML has no white space between the title and the paragraph of the caption; the key glues them together, we put a space'
NO_PREFIX = 'the file never binds the prefix xlink, so that the key found no hrefs; the recovered attributes name these files'
RAISED = 'text is raised, or stands in a formula: the key glues it or spaces it, we write it in a line with its mark'
# (article, field) → figures that differ, and why. Every other figure of every article must agree.
DIFFERENCES = {
    ('elife-30274-v1', 'caption'): (['fig2', 'fig2s1', 'fig2s2', 'fig3'], GLUED),
    ('plosone-0178565', 'caption'): (['pone.0178565.g003', 'pone.0178565.g006'], GLUED),
    ('PMC3460867_pone.0046493.nxml', 'caption'): ([f'pone-0046493-g00{i}' for i in (1, 2, 3, 4)], GLUED),
    ('PMC5828200.nxml', 'caption'): (['F9', 'F11'], GLUED),
    ('PMC7289599_elife-56337.nxml', 'caption'): (['fig1', 'fig1s1', 'fig1s2', 'fig1s3', 'fig2', 'fig4', 'fig4s3'], GLUED),
    ('PMC7302504_pone.0234687.nxml', 'caption'): (['pone.0234687.g003'], GLUED),
    ('elife-46472-v3', 'caption'): (['fig8'], RAISED),
    ('PMC6849754_math_in_all_captions.xml', 'caption'): (['ele13210-fig-0002', 'ele13210-fig-0006'], RAISED),
    ('encoda_fig_malformed.xml', 'graphics'): (['f1', 'f8', 'f1', 'f3', 'fig6'], NO_PREFIX),
}


@pytest.fixture(scope='module')
def both():
    key = defaultdict(list)
    for line in (FOLDER / 'expected.jsonl').read_text(encoding='utf-8').splitlines():
        row = json.loads(line)
        key[row['file']].append(row)
    start, problems, ours = time.time(), [], {}
    for path in A.find_articles([FOLDER / 'xml', FOLDER / 'packages']):
        name = path.parent.name if path.parent.parent.name == 'packages' else path.name
        ours[name] = A.read_article(path, notes=problems)
    return dict(key), ours, problems, time.time() - start


def test_every_article_is_read(both):
    key, ours, problems, seconds = both
    assert sum(map(len, key.values())) == 257
    assert len(ours) == 24 and {k for k, v in ours.items() if v} == set(key)
    assert {k: len(v) for k, v in ours.items() if v} == {k: len(v) for k, v in key.items()}
    assert len(problems) == 1 and RECOVERED in problems[0]
    assert seconds < 20


def compared(want, got):
    "The fields of one figure, ours beside the key's."
    first = want['caption_starts'].split()
    return dict(fig_id=(want['fig_id'], got['fig_id']),
                label=((want['label'] or '').rstrip('.'), got['label'] or ''),
                caption=(first, got['caption'].split()[:len(first)] if first else got['caption'].split()),
                graphics=(want['graphics'], got['graphics']),
                mentions=(True, bool(got['mentions']) or not want['xrefs']),
                sub_article=(want['sub_article'], got['sub_article']))


def test_figures_agree_but_for_the_explained_differences(both):
    (key, ours, *_), found = both, defaultdict(list)
    for name, rows in key.items():
        for want, got in zip(rows, ours[name], strict=True):
            for field, (theirs, mine) in compared(want, got).items():
                if theirs != mine: found[name, field].append(want['fig_id'])
    assert dict(found) == {k: figs for k, (figs, why) in DIFFERENCES.items()}


def test_glued_captions_differ_by_a_space_only(both):
    key, ours, *_ = both
    for (name, field), (figs, why) in DIFFERENCES.items():
        for want, got in zip(key[name], ours[name]):
            if why != GLUED or want['fig_id'] not in figs: continue
            first = want['caption_starts'].replace(' ', '')
            assert got['caption'].replace(' ', '').startswith(first)


def test_a_cross_reference_is_a_mention_by_cross_reference(both):
    "The key counts references to a figure's own id; figures without id are reached through their group."
    key, ours, *_ = both
    for name, rows in key.items():
        for want, got in zip(rows, ours[name]):
            linked = any(m['xref'] for m in got['mentions'])
            assert linked == bool(want['xrefs']) or want['fig_id'] is None and want['fig_group'], (name, want)


def test_captions_have_the_length_of_the_key(both):
    for name, rows in both[0].items():
        for want, got in zip(rows, both[1][name], strict=True):
            more = want['caption_words'] - len(got['caption'].split())
            most = 47 if name in WITH_DATA else 200 if name == IN_FORMULAS else 3
            assert -3 <= more <= most, (name, want['fig_id'])


def letters(text): return re.sub(r'[\W_]+', '', text)


def test_no_letter_of_a_caption_is_lost(both):
    "Marks and spaces may differ from the strings of the XML; letters and digits may not."
    for path in sorted((FOLDER / 'xml').iterdir()):
        art = A.parse_jats(path.read_bytes(), path.name)[0]
        for fig, got in zip(art.iter('{*}fig'), both[1][path.name]):
            own = fig.find('{*}caption')
            if own is None or path.name in WITH_DATA: continue
            etree.strip_elements(own, '{*}tex-math', '{*}annotation', etree.Comment, with_tail=False)
            assert letters(got['caption']) == letters(''.join(own.itertext())), (path.name, got['fig_id'])


def test_hrefs_survive_an_unbound_prefix(both):
    got = [r['graphics'] for r in both[1][RECOVERED]]
    assert got[0] == ['f1'] and got[2] == ['fors2662.f1'] and len(got[3]) == 5


def test_images_are_found_where_they_are(both):
    found = {name: [r['image'] is not None for r in rows] for name, rows in both[1].items()}
    want = {'elife-30274-v1': 5, 'elife-43154-v2': 3, 'elife-46472-v3': 8, 'plosone-0178565': 6,
            'ijm-00202': 2,
            'biorxiv-2020.04.07.030213': 6}
    assert {k: sum(found[k]) for k in want} == want
    assert sum(map(sum, found.values())) == sum(want.values())
    for rows in both[1].values():
        for r in rows:
            if r['image']: assert A.open_image(r['image']).size == (r['width'], r['height'])


def test_contract_and_mentions(both):
    keys = set('pmcid pmid doi journal date licence lang fig_id label caption mentions graphics image panels modalities '
               'width height sub_article source'.split())
    rows = [r for v in both[1].values() for r in v]
    assert all(keys <= set(r) for r in rows) and len({r['id'] for r in rows}) == len(rows)
    assert all(set(m) == {'text', 'section', 'xref'} and m['text'] for r in rows
               for m in r['mentions'])
    assert not any(re.search(r'(?:Fig|Figs|et al|e\.g)\.$', m['text']) for r in rows
                   for m in r['mentions'])
    supplement = next(r for r in both[1]['PMC7289599_elife-56337.nxml'] if r['fig_id'] == 'fig1')
    assert supplement['label'] == 'Figure 1' and supplement['graphics'][0] == 'elife-56337-fig1'


def test_heads(both):
    def head(name, *keys): return tuple(both[1][name][0][k] for k in keys)
    assert head('PMC5828200.nxml', 'pmcid', 'pmid', 'date', 'licence') == ('PMC5828200', '29535835',
        '2018-01-31', 'CC BY 3.0')
    assert head('PMC2599765_ehp-116-1694.nxml', 'licence', 'date') == ('public domain',
        '2008-08-01')
    assert head('elife-46472-v3', 'licence', 'doi') == ('CC0 1.0', '10.7554/eLife.46472')
    assert Counter(r['lang'] for r in both[1]['scielo_figgroup_pt_noid.xml']) == {'pt': 14,
        'en': 14}
    assert Counter(r['lang'] for r in both[1]['scielo_subarticles_en_pt_es.xml']) == {'en': 4,
        'pt': 4, 'es': 4}


def test_named_entities_lose_no_text():
    raw = (FOLDER / 'xml' / 'scielo_named_entities_es.xml').read_bytes()
    art, = A.parse_jats(raw, 'x')
    text = ''.join(art.itertext())
    assert text.count('\xa0') >= raw.count(b'&nbsp;') and text.count('¿') >= raw.count(b'&iquest;')


def test_the_command_on_everything(tmp_path, capsys):
    assert A.figures([FOLDER], tmp_path / 'figures.jsonl') == 0
    assert '257 figures' in capsys.readouterr().out
    assert len((tmp_path / 'figures.jsonl').read_text(encoding='utf-8').splitlines()) == 257
    kinds = [json.loads(x)['source']
             for x in (tmp_path / 'figures.jsonl.problems.jsonl').read_text().splitlines()]
    assert [k.split('/')[-1] for k in kinds] == [RECOVERED, 'scielo_named_entities_es.xml']


def test_every_dicom_opens_or_says_why():
    opened, refused = [], {}
    for path in sorted((data_folder() / 'dicom').iterdir()):
        try: opened.append((path.name, A.open_image(path)))
        except A.ImageError as e: refused[path.name] = str(e)
    assert all(im.mode == 'RGB' and im.getextrema() != ((0, 0),) * 3 for _, im in opened)
    assert len(opened) >= 20 and all('\n' not in why for why in refused.values())
    assert 'without pixels' in refused['rtplan.dcm']


def test_modality_rules_on_real_radiology_captions():
    """ROCOv2's manual concepts say what each of 100 images is."""
    folder = data_folder() / 'rocov2'
    rows = pd.read_csv(folder / 'sample_test_captions.csv').merge(
        pd.read_csv(folder / 'sample_test_concepts_manual.csv'), on='ID')
    is_ct, is_mri = (rows.CUIs.str.contains(c) for c in ('C0040405', 'C0024485'))
    is_chest = rows.CUIs.str.contains('C1306645') & rows.CUIs.str.contains('C0817096')
    for name, truth, recall in (('ct_scan', is_ct, .8), ('mri', is_mri, .8), ('chest_xray', is_chest, .9)):
        got = rows.Caption.map(lambda t: A.guess_modalities(t)[name])
        assert (got & truth).sum() >= .9 * got.sum(), name
        assert (got & truth).sum() >= recall * truth.sum(), name
    assert not any(A.guess_modalities(t)['gross'] for t in rows.Caption)
