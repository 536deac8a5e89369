"Articles as people have them: packages of several, archives of thousands, packed XML, one flat folder; formulas and raised text."
import gzip, io, json, tarfile, time, zipfile

import pytest
from lxml import etree
from PIL import Image

from llava_med.data import articles as A
from llava_med.data.jats import element_text

XLINK = 'xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:mml="http://www.w3.org/1998/Math/MathML"'


def one(n, graphic='gr1', body='', front=''):
    "An article with one figure."
    return (f'<article {XLINK}><front><article-meta><article-id pub-id-type="pmc">{n}</article-id>{front}</article-meta></front>'
            f'<body><p>See Fig. 1.</p>{body}<fig id="F1"><label>Fig. 1</label><caption><p>CT of patient {n}.</p></caption>'
            f'<graphic xlink:href="{graphic}"/></fig></body></article>').encode()


def jpeg():
    f = io.BytesIO(); Image.new('RGB', (40, 30), 'red').save(f, 'JPEG'); return f.getvalue()


def packed(path, files):
    with tarfile.open(path, 'w:gz') as t:
        for name, data in files:
            m = tarfile.TarInfo(name); m.size = len(data); t.addfile(m, io.BytesIO(data))
    return path


def text(inner): return element_text(etree.fromstring(f'<p {XLINK}>{inner}</p>'), frozenset())[0]
def cite(n): return f'<xref ref-type="bibr" rid="b{n}">{n}</xref>'


# Raised text, citations, formulas

@pytest.mark.parametrize('inner, want', [
    ('p = 1.12 × 10<sup>-7</sup>', 'p = 1.12 × 10^-7'), ('5 × 10<sup>6</sup> cells/mm<sup>3</sup>', '5 × 10^6 cells/mm^3'),
    ('per 1.73 m<sup>2</sup>', 'per 1.73 m^2'), ('<sup>18</sup>F-FDG and [<sup>11</sup>C]', '18F-FDG and [11C]'), ('H<sub>2</sub>O, HbA<sub>1c</sub>', 'H2O, HbA1c'),
    ('10 <sup>−7</sup>', '10 ^−7'), ('CD4<sup>+</sup>, p<sup>*</sup>, the 1<sup>st</sup>', 'CD4+, p*, the 1st'), ('SO<sub>4</sub><sup>2-</sup>', 'SO4^2-'),
    ('10<sup>6</sup>5', '10^(6)5'), ('d<sub>H</sub>8.21', 'd_(H)8.21'), ('e<sup>x+1</sup>', 'e^(x+1)'), ('C<sub>max</sub> of x<sub>i</sub>', 'C_max of x_i')])
def test_raised_and_lowered_text_keeps_a_mark(inner, want): assert text(inner) == want


@pytest.mark.parametrize('inner, want', [
    (f'measured 3<sup>{cite(12)}</sup> cm in 2016<sup>{cite(4)}</sup> (Figure 1).', 'measured 3 [12] cm in 2016 [4] (Figure 1).'),
    (f'of 3<xref ref-type="bibr" rid="b4"><sup>4</sup></xref> cm, after Roe<sup>{cite(12)}</sup>.', 'of 3 [4] cm, after Roe [12].'),
    (f'as known.<sup>{cite(1)},{cite(2)}</sup> It', 'as known.[1,2] It'), ('was found.<sup>12</sup> It', 'was found.[12] It'), (f'3{cite(4)} cm', '3 [4] cm'),
    (f'<sup>[{cite(3)}]</sup>', '[3]'), (f'Roe [{cite(3)}] and Roe ({cite(2019)})', 'Roe [3] and Roe (2019)')])
def test_citations_stand_apart(inner, want): assert text(inner) == want


@pytest.mark.parametrize('math, want', [
    ('<mi>f</mi><mfenced><mi>x</mi></mfenced><mo>=</mo><mfenced open="[" close="]"><mn>0</mn><mn>1</mn></mfenced>', 'f(x)=[0,1]'),
    ('<mfrac><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow><mn>2</mn></mfrac>', '(a+b)/2'), ('<msup><mn>10</mn><mrow><mo>−</mo><mn>7</mn></mrow></msup>', '10^−7'),
    ('<mfrac><mn>1</mn><mn>2</mn></mfrac><mi>x</mi>', '(1/2)x'), ('<msup><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow><mn>2</mn></msup>', '(a+b)^2'),
    ('<msubsup><mi>V</mi><mtext>max</mtext><mo>′</mo></msubsup>', 'V_max′'), ('<mfenced open="|" close="|"><mi>x</mi></mfenced>', '|x|'),
    ('<msqrt><mi>x</mi><mo>+</mo><mn>1</mn></msqrt>', '√(x+1)'), ('<mroot><mi>x</mi><mn>3</mn></mroot>', 'x^(1/3)'), ('<mover><mi>x</mi><mo>¯</mo></mover>', 'x̄')])
def test_formulas_read_in_one_line(math, want):
    strict = math.replace('<', '<mml:').replace('<mml:/', '</mml:')
    assert text(f'<mml:math>{strict}</mml:math>') == want


def test_a_formula_does_not_stick_to_the_words_around_it():
    assert text('of<mml:math><mml:mi>w</mml:mi></mml:math>and') == 'of w and'


def test_listed_panels_have_the_letters_of_the_page():
    caption = '<list list-type="alpha-lower"><list-item><p>Axial.</p></list-item><list-item><p>Coronal.</p></list-item></list>'
    assert text(caption) == '(a) Axial. (b) Coronal.' and A.count_panels(text(caption)) == 2


# Whose figure, whose sentence

def mentions(body, figs):
    floats = ''.join(f'<fig id="F{n}"><label>Figure {n}</label></fig>' for n in figs)
    rows = A.article_records(f'<article {XLINK}><body>{body}{floats}</body></article>'.encode(), 'toy.xml')
    return [[m['text'] for m in r['mentions']] for r in rows]


def test_panels_that_are_figures_of_their_own():
    a, b = mentions('<p>Opacities were seen (Fig. 1A). A mass is shown in Figure 1B. Both (Figures 1A and 1B) resolved. Figure 1 shows all.</p>', ['1A', '1B'])
    assert a == ['Opacities were seen (Fig. 1A).', 'Both (Figures 1A and 1B) resolved.', 'Figure 1 shows all.']
    assert b == ['A mass is shown in Figure 1B.', 'Both (Figures 1A and 1B) resolved.', 'Figure 1 shows all.']


def test_a_panel_of_a_whole_figure_is_that_figure():
    assert mentions('<p>Seen in Fig. 1B and in Figs. 1A-C.</p>', ['1', '2']) == [['Seen in Fig. 1B and in Figs. 1A-C.'], []]
    assert mentions('<p>Seen in Figs. 1A-C.</p>', ['1A', '1B', '1C', '1D'])[1:] == [['Seen in Figs. 1A-C.']]*2 + [[]]


def test_one_link_with_two_panels_names_both():
    a, b = mentions('<p>Both (<xref ref-type="fig" rid="F1A">Figures 1A and 1B</xref>) grew.</p>', ['1A', '1B'])
    assert a == b == ['Both (Figures 1A and 1B) grew.']


def test_a_cell_that_only_names_a_figure_is_no_mention():
    row = '<table-wrap><table><tr><td><xref ref-type="fig" rid="F1">Fig. 1</xref></td><td>(Fig. 1)</td><td>{}</td></tr></table></table-wrap>'
    assert mentions(row.format('Other'), ['1']) == [[]]
    assert mentions(row.format('Mass, <xref ref-type="fig" rid="F1">Fig. 1</xref>'), ['1']) == [['Mass, Fig. 1']]


def test_a_reference_after_the_stop_belongs_to_the_sentence_before():
    assert mentions('<p>It was small. A cyst grew. (Fig. 1). It burst.</p>', ['1']) == [['A cyst grew. (Fig. 1).']]
    assert mentions('<p>See Fig. 1. (Fig. 1).</p><p>Fig. 1.</p>', ['1']) == [['See Fig. 1. (Fig. 1).']]


def test_a_link_is_not_believed_against_its_own_words():
    one_, two = mentions('<p>The femur (<xref ref-type="fig" rid="F8">18C</xref> of Figs. 18) broke.</p>', ['8', '18'])
    assert one_ == [] and two == ['The femur (18C of Figs. 18) broke.']


def test_figures_of_other_papers_are_not_ours():
    said = '<p>As before (Figure 1E; Lin et al., 2012). See Figure 1 and Table S1 of Lin et al. It is Fig. 1 of the original study.</p>'
    assert mentions(said, ['1']) == [[]]


@pytest.mark.parametrize('caption, n', [
    ('a Axial CT. b Coronal CT.', 2), ('a axial CT, b the coronal plane', 2), ('A, Axial CT. B, Coronal CT. C, MRI.', 3), ('Panels a, b and c show CT.', 3),
    ('CT before (left) and after (right).', 2), ('(A-D) CT; (E) MRI', 5), ('(a, arrow) CT and (b) MRI', 2), ('(A) x (B) x (C) x (D) x (E) x (F) x (G) x (H) x (I) x (J)', 10),
    ('a, b, c Different letters indicate significant differences (p < 0.05).', 1), ('Bars with different letters (a, b, c) differ.', 1),
    ('A mass, a cyst, and a stone.', 1), ('Cyst of the kidney (left).', 1), ('Hepatitis A, B, and C.', 1)])
def test_panels(caption, n): assert A.count_panels(caption) == n


@pytest.mark.parametrize('label, body, n', [('FIG. 2.', 'Fig. 2', 1), ('2', 'Fig. 2', 1), ('Figure 2 (continued)', 'Fig. 2', 1), ('Fig. 2—figure supplement 1', 'Fig. 2', 0)])
def test_one_grammar_of_labels(label, body, n):
    r, = A.article_records(f'<article><body><p>See {body} here.</p><fig><label>{label}</label></fig></body></article>'.encode(), 'toy.xml')
    assert len(r['mentions']) == n


# What a record says

def record(caption='A lesion.', said='', lang='', back='', front=''):
    r, = A.article_records(f'<article {XLINK} {lang}><front><article-meta>{front}</article-meta></front><body><p>{said}</p><fig id="F1"><label>Figure 1</label>'
                           f'<caption><p>{caption}</p></caption></fig></body><back>{back}</back></article>'.encode(), 'toy.xml')
    return r


def test_words_of_a_biopsy_do_not_make_a_radiograph_histology():
    def named(*x): return [k for k, v in record(*x)['modalities'].items() if v]
    assert named('Radiograph of the hand.', 'A lytic lesion (Figure 1); biopsy revealed a sarcoma.') == []
    assert named('The hand.', 'The radiograph showed a lesion (Figure 1), and histology proved a sarcoma.') == []
    assert named('The hand.', 'A biopsy specimen was taken (Figure 1).') == []
    assert named('The hand.', 'Histology showed a sarcoma (Figure 1).') == ['histology']
    assert named('Biopsy specimen with giant cells.') == ['histology']


def test_the_language_is_lower_case(): assert record(lang='xml:lang="EN"')['lang'] == 'en'


@pytest.mark.parametrize('front, note, want', [
    ('', 'This article is distributed under the terms of the Creative Commons Attribution Noncommercial License.', 'CC BY-NC'),
    ('<permissions><copyright-statement>© The Author(s) 2010</copyright-statement></permissions>', 'This is an open access article under the Creative Commons Attribution License.', 'CC BY'),
    ('<permissions><license><p>CC BY-ND 4.0</p></license></permissions>', 'This article is under CC BY.', 'CC BY-ND 4.0'),
    ('<permissions><copyright-statement>© Roe</copyright-statement></permissions>', 'The icons are under a Creative Commons Attribution License.', '© Roe'),
    ('', 'We thank Roe.', None)])
def test_a_licence_among_the_acknowledgements(front, note, want):
    assert record(front=front, back=f'<ack><p>{note}</p></ack>')['licence'] == want


# Whose image

def test_two_articles_in_a_package(tmp_path):
    two = packed(tmp_path/'two.tar.gz', [('PMC12/a.nxml', one(12)), ('PMC123/b.nxml', one(123)), ('PMC123/gr1.jpg', jpeg())])
    a, b = A.read_article(two)
    assert (a['id'], a['image']) == ('PMC12_F1', None) and b['image'].endswith('two.tar.gz::PMC123/gr1.jpg')


def test_two_articles_in_one_folder_of_a_package(tmp_path):
    notes = []
    two = packed(tmp_path/'two.tar.gz', [('x/a.nxml', one(12)), ('x/b.nxml', one(123)), ('x/gr1.jpg', jpeg())])
    assert [r['image'] for r in A.read_article(two, notes=notes)] == [None, None]
    assert len(notes) == 1 and 'gr1.jpg' in notes[0] and 'folder of its own' in notes[0]


def test_xml_that_is_no_article_owns_no_image(tmp_path):
    two = packed(tmp_path/'two.tar.gz', [('x/a.xml', one(12)), ('x/images/meta.xml', b'<meta/>'), ('x/images/gr1.jpg', jpeg())])
    assert A.read_article(two)[0]['image'].endswith('::x/images/gr1.jpg')


def test_two_articles_in_one_folder(tmp_path):
    (tmp_path/'PMC1.xml').write_bytes(one(1)); (tmp_path/'PMC2.xml').write_bytes(one(2)); (tmp_path/'PMC3.xml').write_bytes(one(3, 'pmc3-g1'))
    for name in ('gr1.jpg', 'pmc3-g1.jpg'): (tmp_path/name).write_bytes(jpeg())
    problems = []
    rows = list(A.read_articles([tmp_path], lambda s, why: problems.append(why)))
    assert [r['image'] and r['image'].split('/')[-1] for r in rows] == [None, None, 'pmc3-g1.jpg']
    assert len(problems) == 2 and all('gr1.jpg' in p and 'PMC' in p for p in problems)
    (tmp_path/'PMC2.xml').unlink()
    assert A.read_article(tmp_path/'PMC1.xml')[0]['image'].endswith('gr1.jpg')


# Archives and folders of thousands

def test_an_archive_of_thousands_is_read_member_by_member(tmp_path, capsys):
    n = 5_100
    bulk = packed(tmp_path/'oa.tar.gz', [(f'oa/PMC{i}.xml', one(i)) for i in range(1, n)] + [('oa/gr1.jpg', jpeg()), ('oa/bad.xml', b'no')])
    assert A.figures([bulk], tmp_path/'out.jsonl') == 0
    said = capsys.readouterr().out
    assert f'{n-1} articles, {n-1} figures, 0 with image' in said and 'without its 1 images' in said and 'bad.xml' in said
    rows = [json.loads(x) for x in (tmp_path/'out.jsonl').read_text().splitlines()]
    assert len(rows) == n - 1 and rows[0]['id'] == 'PMC1_F1' and rows[0]['source'].endswith('oa.tar.gz')


def test_a_large_archive_that_is_cut_off_says_how_far_it_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(A, 'MAX_MEMBERS', 3)
    monkeypatch.setattr('llava_med.data.images.MAX_MEMBERS', 3)
    import os
    bulk = packed(tmp_path/'oa.tar.gz', [(f'PMC{i}.xml', one(i, body=f'<p>{os.urandom(3000).hex()}</p>')) for i in range(60)])
    bulk.write_bytes(bulk.read_bytes()[:-40_000])
    problems = []
    rows = list(A.read_articles([bulk], lambda s, why: problems.append(why)))
    assert 5 < len(rows) < 60 and len(problems) == 1 and 'oa.tar.gz' in problems[0] and 'read up to article' in problems[0]


def test_a_large_zip_and_a_hostile_large_archive(tmp_path, monkeypatch):
    for m in (A, __import__('llava_med.data.images', fromlist=['x'])): monkeypatch.setattr(m, 'MAX_MEMBERS', 3)
    with zipfile.ZipFile(tmp_path/'oa.zip', 'w') as z:
        for i in range(9): z.writestr(f'PMC{i}.nxml', one(i))
    assert len(A.read_article(tmp_path/'oa.zip')) == 9
    bad = packed(tmp_path/'bad.tar.gz', [*((f'PMC{i}.nxml', one(i)) for i in range(9)), ('../x.nxml', one(10))])
    with pytest.raises(A.ArticleError, match='outside'): A.read_article(bad)


def test_packed_xml(tmp_path):
    (tmp_path/'PMC1_PMC9.xml.gz').write_bytes(gzip.compress(b'<articles>' + one(1) + one(2) + b'</articles>'))
    assert [r['id'] for r in A.read_article(tmp_path/'PMC1_PMC9.xml.gz')] == ['PMC1_F1', 'PMC2_F1']
    (tmp_path/'cut.xml.gz').write_bytes(gzip.compress(one(1))[:60])
    with pytest.raises(A.ArticleError, match='cut.xml.gz.*cannot be read'): A.read_article(tmp_path/'cut.xml.gz')
    (tmp_path/'no.xml.gz').write_bytes(b'plain')
    with pytest.raises(A.ArticleError, match='no.xml.gz.*cannot be read'): A.read_article(tmp_path/'no.xml.gz')


def test_packed_xml_that_unfolds_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(A, 'MAX_XML', 10_000)
    monkeypatch.setattr('llava_med.data.jats.MAX_XML', 10_000)
    (tmp_path/'bomb.xml.gz').write_bytes(gzip.compress(one(1, body='<p>' + 'x'*100_000 + '</p>')))
    with pytest.raises(A.ArticleError, match='bomb.xml.gz.*larger'): A.read_article(tmp_path/'bomb.xml.gz')


def test_a_flat_folder_takes_time_as_its_articles(tmp_path):
    "Four times the articles may not take much more than four times as long; it was sixteen times."
    took = []
    for n in (250, 1000):
        folder = tmp_path/str(n); folder.mkdir()
        for i in range(n):
            (folder/f'PMC{i}.xml').write_bytes(one(i, f'pmc{i}-g1'))
            (folder/f'pmc{i}-g1.gif').write_bytes(b'')
        start = time.process_time()
        assert sum(1 for _ in A.find_articles([folder])) == n
        for path in A.find_articles([folder]): A._folder(str(folder), folder.stat().st_mtime_ns).files.named(f'{path.stem.lower()}-g1')
        list(A.read_articles([folder], lambda *x: None))
        took.append(time.process_time() - start)
    assert took[1] < 8*took[0]


def test_references_are_left_out_only_where_they_hold_nothing_else():
    refs = '<ref-list><ref id="b1"><mixed-citation>Roe</mixed-citation></ref>{}</ref-list>'
    for inside, n in (('', 0), ('<p>Figure 1 is by Roe.</p>', 1)):
        assert len(record(back=refs.format(inside))['mentions']) == n
