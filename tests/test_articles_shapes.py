"The shapes that JATS takes in real articles, each as the smallest article that has it."
import time

import pytest

from llava_med.data import articles as A
from llava_med.data.jats import figure_numbers, sentence_spans

XLINK = 'xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:mml="http://www.w3.org/1998/Math/MathML"'


def article(body='', floats='', back='', attributes=XLINK, before=''):
    "Records of a small article."
    text = (f'{before}<article {attributes}><front><article-meta/></front><body>{body}</body><back>{back}</back>'
            f'<floats-group>{floats}</floats-group></article>')
    return A.article_records(text.encode(), 'toy.xml')


def fig(fid='F1', label='Figure 1', caption='<p>A lesion.</p>', inside='', tag='fig'):
    "A figure; None leaves a part out."
    parts = [f'<label>{label}</label>' if label is not None else '', f'<caption>{caption}</caption>' if caption is not None else '', inside]
    return f'<{tag}{f""" id="{fid}" """ if fid else ""}>{"".join(parts)}</{tag}>'


def graphic(name): return f'<graphic xlink:href="{name}"/>'
def x(rid, text, kind='fig'): return f'<xref ref-type="{kind}" rid="{rid}">{text}</xref>'
def texts(r): return [m['text'] for m in r['mentions']]
def sentences(s): return [s[a:b] for a, b in sentence_spans(s)]
def numbers(s): return [n for n, *_ in figure_numbers(s)]


# Where figures stand

def test_figures_in_a_group():
    a, b = article(f'<p>See {x("G", "Figure 1")}. Only {x("F1b", "Figure 1B")} is red.</p>',
                   '<fig-group id="G"><label>Figure 1</label><caption><p>Two views.</p></caption>'
                   + fig('F1a', 'A', '<p>Axial.</p>', graphic('a')) + fig('F1b', 'B', None, graphic('b')) + '</fig-group>')
    assert texts(a) == ['See Figure 1.'] and texts(b) == ['See Figure 1.', 'Only Figure 1B is red.']
    assert (a['caption'], b['caption']) == ('Axial.', 'Two views.')
    assert (a['label'], b['label']) == ('A', 'B') and (a['graphics'], b['graphics']) == (['a'], ['b'])


def test_groups_in_groups():
    group = '<fig-group id="O"><label>Figure 2</label><fig-group id="I">' + fig('P', None, None, graphic('p')) + '</fig-group></fig-group>'
    r, = article(f'<p>One {x("O", "here")}. Two {x("I", "there")}. Three in Fig. 2.</p>', group)
    assert len(r['mentions']) == 3 and r['label'] == 'Figure 2' and r['fig_id'] == 'P'


def test_a_group_without_figures_of_its_own_number():
    a, b = article('<p>Both views are in Fig. 3.</p>', '<fig-group><label>Figure 3</label>' + fig('a', 'A') + fig('b', 'B') + '</fig-group>')
    assert texts(a) == texts(b) == ['Both views are in Fig. 3.']


def test_several_graphics_and_alternatives():
    inside = graphic('one') + '<alternatives>' + graphic('two.tif') + graphic('two.jpg') + '</alternatives>'
    text = f'<article {XLINK}><body>{fig(inside=inside)}</body></article>'.encode()
    r, = A.article_records(text, 'toy.xml', ['two.jpg'])
    assert r['graphics'] == ['one', 'two.tif', 'two.jpg'] and r['image'] == 'two.jpg'


@pytest.mark.parametrize('place', ['<supplementary-material id="S1">{}</supplementary-material>', '<boxed-text><sec>{}</sec></boxed-text>',
                                   '<p>Text {} goes on.</p>', '<sec><sec>{}</sec></sec>', '<table-wrap>{}</table-wrap>', '<disp-quote>{}</disp-quote>'])
def test_figures_inside_other_things(place):
    r, = article(place.format(fig(inside=graphic('g'))) + f'<p>A mass ({x("F1", "Fig. 1")}).</p>')
    assert r['caption'] == 'A lesion.' and r['graphics'] == ['g'] and texts(r) == ['A mass (Fig. 1).']


def test_floats_back_matter_and_sub_articles():
    body = f'<p>{x("F1", "Figure 1")} is shown.</p>'
    back = f'<app-group><app><title>Appendix</title>{fig("F2", "Figure A1")}<p>Look at {x("F2", "Figure A1")}.</p></app></app-group>'
    text = (f'<article {XLINK}><body>{body}</body><back>{back}</back><floats-group>{fig()}</floats-group>'
            f'<sub-article><body><p>La Figura 1 es otra.</p>{fig("R1", "Figura 1", "<p>Otra.</p>")}</body></sub-article></article>')
    app, one, sub = A.article_records(text.encode(), 'toy.xml')
    assert (one['label'], texts(one)) == ('Figure 1', ['Figure 1 is shown.'])
    assert app['mentions'] == [dict(text='Look at Figure A1.', section='Appendix', xref=True)]
    assert sub['sub_article'] and not one['sub_article'] and texts(sub) == ['La Figura 1 es otra.']


def test_one_id_in_two_parts_of_an_article_stays_apart():
    text = (f'<article {XLINK}><body><p>In {x("f1", "Figure 1")} we see.</p>{fig("f1")}</body>'
            f'<sub-article><body><p>En la {x("f1", "Figura 1")} vemos.</p>{fig("f1", "Figura 1")}</body></sub-article></article>')
    a, b = A.article_records(text.encode(), 'toy.xml')
    assert texts(a) == ['In Figure 1 we see.'] and texts(b) == ['En la Figura 1 vemos.'] and a['id'] != b['id']


def test_a_figure_inside_a_figure():
    outer, inner = article('<p>Figure 1 is one, Figure 2 another.</p>', fig('O', 'Figure 1', '<p>Outer.</p>',
                           graphic('o') + fig('I', 'Figure 2', '<p>Inner.</p>', graphic('i'))))
    assert (outer['caption'], inner['caption']) == ('Outer.', 'Inner.') and outer['mentions'] == inner['mentions']


# What is missing

def test_missing_parts():
    bare, no_id, no_label, no_caption = article(
        f'<p>Text. See Fig. 2 for this. And {x("F3", "there")}. Fig. 4 too.</p>',
        '<fig/>' + fig(None, 'Fig. 2.') + fig('F3', None) + fig('F4', 'Figure 4:', None))
    assert (bare['label'], bare['caption'], bare['fig_id'], bare['graphics'], bare['mentions']) == (None, '', None, [], [])
    assert texts(no_id) == ['See Fig. 2 for this.'] and no_id['fig_id'] is None
    assert texts(no_label) == ['And there.'] and no_label['label'] is None
    assert texts(no_caption) == ['Fig. 4 too.'] and no_caption['caption'] == '' and no_caption['label'] == 'Figure 4:'
    assert len({r['id'] for r in (bare, no_id, no_label, no_caption)}) == 4


def test_the_number_of_a_figure_without_label_stands_in_its_caption():
    r, = article('<p>We show it (Fig. 7).</p>', fig('z', None, '<p>Figure 7. A cyst.</p>'))
    assert texts(r) == ['We show it (Fig. 7).'] and r['caption'] == 'Figure 7. A cyst.'


@pytest.mark.parametrize('label', ['Figure 5', 'Fig. 5.', 'FIG 5', 'FIGURE 5:', 'Figure 5 |', 'Fig. 5 –', 'Figura 5.', 'Abbildung 5', 'Abb. 5', 'Рис. 5', '图5', 'Figure\u00a05'])
def test_spellings_of_labels(label):
    r, = article('<p>Compare with Fig. 5.</p>', fig(label=label))
    assert texts(r) == ['Compare with Fig. 5.']


def test_body_without_sections_and_sections_without_title():
    r, = article(f'<p>A mass ({x("F1", "Fig. 1")}).</p><sec><p>Again Fig. 1.</p><sec><title>Deep</title><p>Here Fig. 1.</p></sec></sec>', fig())
    assert [m['section'] for m in r['mentions']] == ['', '', 'Deep']


def test_sections_of_mentions():
    back = '<boxed-text><caption><title>Box 1</title></caption><p>As in Fig. 1.</p></boxed-text>'
    r, = article('<sec><title>Results</title><sec><title>Imaging<xref rid="n">*</xref></title><p>See Fig. 1.</p></sec></sec>', fig(), back)
    assert [m['section'] for m in r['mentions']] == ['Results > Imaging*', 'Box 1']


# What captions hold

def test_sub_captions():
    caption = '<title>Two scans.</title><p><bold>(A)</bold> Axial.</p><p>Panels:<list><list-item><p>(B) Coronal.</p></list-item><list-item><label>(C)</label><p>Gross.</p></list-item></list></p>'
    r, = article(floats=fig(caption=caption))
    assert r['caption'] == 'Two scans. (A) Axial. Panels: (B) Coronal. (C) Gross.' and r['panels'] == 3


def test_captions_of_single_graphics():
    "They count only where the figure has no caption of its own."
    inside = '<graphic xlink:href="a"><label>a</label><caption><p>Axial.</p></caption></graphic>'
    r, = article(floats=fig(inside=inside))
    assert r['caption'] == 'A lesion.'
    r, = article(floats=fig(caption=None, inside=inside + inside.replace('Axial', 'Coronal')))
    assert r['caption'] == 'Axial. Coronal.'


def test_source_data_in_a_caption_is_not_caption():
    data = '<supplementary-material><label>Figure 1—source data 1.</label><caption><p>Numbers.</p></caption></supplementary-material>'
    r, = article(floats=fig(caption=f'<title>Cells.</title><p>Shown.</p><p>{data}</p>'))
    assert r['caption'] == 'Cells. Shown.'


def test_maths_once_and_entities():
    formula = r'''<inline-formula><alternatives><tex-math>\documentclass{x}\begin{document}$$a$$\end{document}</tex-math>
    <mml:math><mml:semantics><mml:mrow><mml:mi>a</mml:mi><mml:mo>=</mml:mo><mml:mn>2</mml:mn></mml:mrow><mml:annotation encoding="TeX">a=2</mml:annotation>
    </mml:semantics></mml:math></alternatives></inline-formula>'''
    r, = article(floats=fig(caption=f'<p>Width {formula}&nbsp;mm, &alpha; &lt; 5&#37; &amp; &unknown; <![CDATA[x < y]]>.</p>'))
    assert r['caption'] == 'Width a=2 mm, α < 5% & &unknown; x < y.'


def test_comments_and_instructions_are_no_text():
    r, = article(floats=fig(caption='<p>A <!-- not this --><?nor this?>lesion.</p>'))
    assert r['caption'] == 'A lesion.'


@pytest.mark.parametrize('attributes', [XLINK + ' xmlns="http://jats.nlm.nih.gov"', XLINK + ' xmlns="https://x.org/other"'])
def test_a_default_namespace(attributes):
    r, = article(f'<p>See {x("F1", "Fig. 1")}.</p>', fig(inside=graphic('g')), attributes=attributes)
    assert r['caption'] == 'A lesion.' and r['graphics'] == ['g'] and texts(r) == ['See Fig. 1.']


def test_a_prefixed_namespace():
    text = ('<j:article xmlns:j="http://jats.nlm.nih.gov" xmlns:l="http://www.w3.org/1999/xlink"><j:body><j:p>In <j:xref rid="a">Fig. 1</j:xref>.</j:p>'
            '<j:fig id="a"><j:label>Fig. 1</j:label><j:caption><j:p>Cyst.</j:p></j:caption><j:graphic l:href="g"/></j:fig></j:body></j:article>')
    r, = A.article_records(text.encode(), 'toy.xml')
    assert (r['caption'], r['graphics'], texts(r)) == ('Cyst.', ['g'], ['In Fig. 1.'])


def test_articles_in_an_envelope():
    one = f'<article {XLINK}><body>{fig()}</body></article>'
    envelope = f'<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><record><metadata>{one}</metadata></record></OAI-PMH>'
    assert len(A.article_records(envelope.encode(), 'oai.xml')) == 1
    assert len(A.article_records(f'<pmc-articleset>{one}{one}</pmc-articleset>'.encode(), 'set.xml')) == 2


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'iso-8859-1', 'windows-1252', 'utf-8-sig'])
def test_encodings(encoding):
    said = encoding.removesuffix('-sig').removesuffix('-le').removesuffix('-be')
    text = f'<?xml version="1.0" encoding="{said}"?><article {XLINK}><body>{fig(caption="<p>Fünf &eacute; Läsionen.</p>")}</body></article>'
    r, = A.article_records(text.encode(encoding), 'toy.xml')
    assert r['caption'] == 'Fünf é Läsionen.'


def test_bytes_that_are_not_the_encoding_they_claim():
    notes = []
    text = f'<?xml version="1.0" encoding="UTF-8"?><article {XLINK}><body>{fig(caption="<p>Fünf.</p>")}{fig("F2", "Figure 2")}</body></article>'
    records = A.article_records(text.encode('latin-1'), 'toy.xml', notes=notes)
    assert [r['caption'] for r in records] == ['Fünf.', 'A lesion.'] and len(notes) == 1 and 'UTF-8' in notes[0]


def test_captions_in_other_languages():
    captions = '<caption xml:lang="pt"><p>Lesão no pulmão.</p></caption><caption xml:lang="en"><p>Lung lesion.</p></caption>'
    r, s, t = article('<p>Ver Figura 1. 如图2所示。 См. рис. 3.</p>', fig(caption=None, label='Figura 1', inside=captions)
                      + '<fig xml:lang="zh"><label>图2</label><caption><p>肺部病变</p></caption></fig>'
                      + '<fig xml:lang="ru"><label>Рис. 3</label><caption><p>Опухоль лёгкого</p></caption></fig>', attributes=XLINK + ' xml:lang="pt"')
    assert (r['caption'], r['lang']) == ('Lesão no pulmão.', 'pt') and (s['caption'], s['lang'], t['lang']) == ('肺部病变', 'zh', 'ru')
    assert r['mentions'] and s['mentions'] and t['mentions']


# Which figures a sentence names

@pytest.mark.parametrize('text, want', [
    ('Figs. 2–4', '2 3 4'), ('Figure 1A and 3b', '1 3'), ('Figs. 1, 2, and 5', '1 2 5'), ('Figures 1 through 3', '1 2 3'), ('Figs 1A–C and 2', '1 2'),
    ('Fig. 1(a) and (b)', '1'), ('Figure 1A, B and 2C', '1 2'), ('Figs. 2 & 3', '2 3'), ('FIG. 3', '3'), ('Fig.3', '3'), ('Fig 1A/B', '1'), ('Figs. 1/2', '1 2'),
    ('Figure 1a,b,d and 4', '1 4'), ('Figures 3A-3C', '3'), ('Figures S1–S3', 'S1 S2 S3'), ('Figs. 1; 2', '1'), ('Figure 12', '12'), ('(Fig. 1; Fig. 2)', '1 2'),
    ('Figure 3, 5 patients died', '3'), ('Figures 3, 5 show', '3 5'), ('Fig. 1, 2 and 3', '1 2 3'), ('Figure 2, 3.5 mm', '2'), ('Figure 1.2', ''), ('configure 3', ''),
    ('Figuras 1 e 2', '1 2'), ('Figuras 1 y 3', '1 3'), ('Figuras 2 a 4', '2 3 4'), ('Abbildungen 1 und 2', '1 2'), ('Abb. 3', '3'), ('Figures 1 et 2', '1 2'),
    ('Figures 2 à 4', '2 3 4'), ('рис. 2', '2'), ('图3', '3'), ('Figure 1 a 5 mm nodule', '1'), ('Figs. 1\u20133', '1 2 3'), ('Figs. 1\u22123', '1 2 3'),
    ('Supplementary Figure 1', ''), ('Supplementary Figs. 1 and 2', ''), ('Extended Data Fig. 3', ''), ('Figure 1—figure supplement 2', ''), ('Additional file 1: Figure 2', ''),
    ('Fig. 2 of Roe et al.', ''), ('Figure 4 in ref. 12', ''), ('Fig. 2 in [3]', ''), ('Table 1 and Figure 2', '2'), ('Figs. 1–400', '1 400'), ('Figure 9-7', '9 7')])
def test_figures_named_in_words(text, want): assert numbers(text) == want.split()


def test_a_range_of_cross_references_names_what_lies_between():
    records = article(f'<p>Growth was seen (Figs. {x("F1", "1")}–{x("F4", "4")}). None here.</p>', ''.join(fig(f'F{i}', f'Figure {i}') for i in range(1, 6)))
    assert [[m['xref'] for m in r['mentions']] for r in records] == [[True], [False], [False], [True], []]


def test_one_cross_reference_to_several_figures():
    floats = ''.join(fig(f'F{i}', f'Figure {i}') for i in range(1, 5))
    by_id = article(f'<p>See {x("F1 F3", "Figs. 1 and 3")}.</p>', floats)
    by_text = article(f'<p>See {x("F1", "Figs. 1–3")}.</p>', floats)
    assert [bool(r['mentions']) for r in by_id] == [True, False, True, False]
    assert [bool(r['mentions']) for r in by_text] == [True, True, True, False]


def test_cross_references_elsewhere_count_for_nobody():
    "A supplement may be called Figure 1, too; an id that is nowhere is a slip, and the words decide."
    other = '<supplementary-material id="S1"><label>Figure 1</label></supplementary-material>'
    assert article(f'<p>See {x("S1", "Figure 1", "supplementary-material")}.</p>{other}', fig())[0]['mentions'] == []
    assert texts(article(f'<p>See {x("f-1", "Figure 1")}.</p>', fig())[0]) == ['See Figure 1.']


def test_a_reference_to_a_part_of_a_figure():
    r, = article(f'<p>Look at {x("g1", "the scan")}.</p>', fig(inside='<graphic id="g1" xlink:href="g"/>'))
    assert texts(r) == ['Look at the scan.']


def test_a_reference_to_what_stands_inside_a_figure_is_not_one_to_the_figure():
    "Figure supplements and source data may lie inside the figure's element."
    data = '<supplementary-material id="d1"><label>Figure 1—source data 1.</label></supplementary-material>'
    inside = f'<p>{fig("F1s1", "Figure 1—figure supplement 1")}{data}</p>'
    one, supplement = article(f'<p>{x("F1s1", "Figure 1—figure supplement 1A")} is red. {x("d1", "Figure 1—source data 1")} is new.</p>', fig(inside=inside))
    assert one['mentions'] == [] and texts(supplement) == ['Figure 1—figure supplement 1A is red.']


def test_references_outside_paragraphs():
    body = (f'<sec><title>Course ({x("F1", "Fig. 1")})</title><table-wrap><table><tr><td>Mass, see {x("F1", "Fig. 1")}</td></tr></table></table-wrap></sec>')
    assert texts(article(body, fig())[0]) == ['Course (Fig. 1)', 'Mass, see Fig. 1']


def test_a_sentence_counts_once_for_a_figure():
    r, = article(f'<p>Both {x("F1", "Figure 1A")} and {x("F1", "1B")} (Fig. 1) are red.</p>', fig())
    assert len(r['mentions']) == 1 and r['mentions'][0]['xref']


def test_lists_in_the_text():
    r, = article(f'<p>Findings:<list><list-item><p>a mass ({x("F1", "Fig. 1")}),</p></list-item></list></p>', fig())
    assert texts(r) == ['a mass (Fig. 1),']


# Sentences

@pytest.mark.parametrize('text, n', [
    ('As Fig. 3 shows. We saw it.', 2), ('Seen in Figs. 3 and 4. It grew.', 2), ('Some, e.g. MRI, were used. We agree.', 2), ('Roe et al. (2019) agree. So do we.', 2),
    ('That is, i.e. The Hague. No.', 2), ('Dr. Roe saw Mrs. Doe vs. Mr. Poe. All left.', 2), ('It was 4.2 mm. It grew.', 2), ('(See Fig. 1.) The mass grew.', 2),
    ('No. 7 died. Others lived.', 2), ('Was it? Yes! Good.', 3), ('S. aureus and E. coli grew. Done.', 2), ('In Fig. 1A. The rest.', 2), ('See Fig. S1 and Eq. 2. Next.', 2),
    ('The U.S. Army came. It left.', 2), ('A mass of approx. 5 cm. It grew.', 2), ('A tumour was found.12 The patient died.', 2), ('It was found.3,4 We saw Fig.3 Then.', 2),
    ('This is known.[12] We knew.', 2), ('Doses of 5 mg i.v. Were given. Yes.', 3), ('病变见图1。患者出院。', 2), ('See Ref. 5. It is old.', 2), ('A value of p < .05 was used. Then.', 2),
    ('Smith J. et al. wrote. We read.', 2), ('Ca. 5 cm. Then.', 2), ('Vitamin D. The next.', 2), ('At 3 p.m. The scan came.', 2), ('5 pts. were seen. Good.', 2)])
def test_sentences(text, n): assert len(sentences(text)) == n, sentences(text)


def test_sentences_lose_nothing():
    text = 'One Fig. 1. Two et al. 2019! Three? (Four.) Five.12 Six. 7 mm.'
    spans = sentence_spans(text)
    assert ''.join(text[a:b] for a, b in spans).replace(' ', '') == text.replace(' ', '')
    assert all(a < b for a, b in spans) and spans == sorted(spans)


# Licence, ids, journal, date

def test_head_of_an_article():
    front = ('<front><journal-meta><journal-title-group><journal-title>J. <italic>Toy</italic></journal-title></journal-title-group></journal-meta><article-meta>'
             '<article-id pub-id-type="pmcid">PMC99.1</article-id><article-id pub-id-type="pmid">5</article-id><article-id pub-id-type="doi">10.1/x</article-id>'
             '<pub-date pub-type="collection"><year>2020</year></pub-date><pub-date pub-type="epub"><day>5</day><month>1</month><year>2021</year></pub-date>'
             '<permissions><license><license-p>Under <ext-link xlink:href="https://creativecommons.org/licenses/by-nc/4.0/">CC</ext-link></license-p></license></permissions>'
             '</article-meta></front>')
    own = '<permissions><license xlink:href="https://creativecommons.org/publicdomain/zero/1.0/"/></permissions>'
    a, b = A.article_records(f'<article {XLINK}>{front}<body>{fig()}{fig("F2", "Figure 2", inside=own)}</body></article>'.encode(), 'toy.xml')
    assert [a[k] for k in ('pmcid', 'pmid', 'doi', 'journal', 'date', 'licence')] == ['PMC99', '5', '10.1/x', 'J. Toy', '2021-01-05', 'CC BY-NC 4.0']
    assert b['licence'] == 'CC0 1.0' and a['id'] == 'PMC99_F1'


@pytest.mark.parametrize('said, want', [
    ('<copyright-statement>Roe et al. Distributed under the terms of the Creative Commons Attribution License.</copyright-statement>', 'CC BY'),
    ('<license xlink:href="http://creativecommons.org/licenses/by-nc-nd/3.0/"><p>Open.</p></license>', 'CC BY-NC-ND 3.0'),
    ('<permissions><license><license-p>Creative Commons Attribution Non-Commercial Share Alike</license-p></license></permissions>', 'CC BY-NC-SA'),
    ('<permissions><ali:license_ref xmlns:ali="http://www.niso.org/schemas/ali/1.0/">https://creativecommons.org/licenses/by/4.0/</ali:license_ref></permissions>', 'CC BY 4.0'),
    ('<permissions><license license-type="cc-by-nc"><p>Open.</p></license></permissions>', 'CC BY-NC'), ('<permissions><license><p>This is under CC0.</p></license></permissions>', 'CC0 1.0'),
    ('<permissions><license><p>Under a CC BY-NC-ND 4.0 licence.</p></license></permissions>', 'CC BY-NC-ND 4.0'),
    ('<permissions><copyright-statement>All rights reserved.</copyright-statement></permissions>', 'All rights reserved.'), ('', None)])
def test_licences_in_old_and_new_places(said, want):
    r, = A.article_records(f'<article {XLINK}><front><article-meta>{said}</article-meta></front><body>{fig()}</body></article>'.encode(), 'toy.xml')
    assert r['licence'] == want


# Unfriendly XML

BOMB = ''.join(f'<!ENTITY l{i} "{f"&l{i-1};"*10}">' for i in range(1, 10))


@pytest.mark.parametrize('prolog', [
    f'<!DOCTYPE article [<!ENTITY l0 "ha">{BOMB}]>', f'<!-- <a> --><!DOCTYPE article [<!ENTITY l0 "ha">{BOMB}]>', f'<?pi <a>?>\n<!DOCTYPE article [<!ENTITY l0 "ha">{BOMB}]>',
    '<!DOCTYPE article [<!ENTITY l9 SYSTEM "file:///etc/passwd">]>', '<!DOCTYPE article [<!ENTITY % p SYSTEM "http://127.0.0.1:9/x.dtd"> %p;]>',
    '<!DOCTYPE article [ <!-- ]> --> <!ENTITY l9 "x">]>', '<!DOCTYPE article SYSTEM "a>b" [<!ENTITY l9 "x">]>', '<!DOCTYPE a [<!ATTLIST a b CDATA "]>">\n<!ENTITY l9 "x">]>'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16', 'utf-7'])
def test_own_entities_are_refused(prolog, encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?>{prolog}<article><body><fig id="&l9;"><caption><p>&l9;</p></caption></fig></body></article>'
    data = text.encode(encoding) if encoding != 'utf-7' else text[:38].encode() + text[38:].replace('<', '+ADw-').encode()
    start = time.time()
    with pytest.raises(A.ArticleError, match='toy.xml.*(entities|encoding)'): A.article_records(data, 'toy.xml')
    assert time.time() - start < 1


def test_an_external_dtd_is_not_fetched(tmp_path):
    import http.server, threading
    asked = []
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self): asked.append(self.path); self.send_response(200); self.end_headers(); self.wfile.write(b'<!ENTITY secret "leak">')
        def log_message(self, *a): pass
    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path/'x.dtd').write_text('<!ENTITY secret "leak">')
    for system in (f'http://127.0.0.1:{server.server_port}/x.dtd', f'file://{tmp_path}/x.dtd', f'{tmp_path}/x.dtd'):
        r, = article(floats=fig(caption='<p>A &secret; lesion.</p>'), before=f'<!DOCTYPE article PUBLIC "-//NLM//DTD JATS//EN" "{system}">')
        assert r['caption'] == 'A &secret; lesion.'
    r, = article('<xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="/etc/hostname" parse="text"/>', fig())
    server.shutdown()
    assert asked == [] and r['caption'] == 'A lesion.'


@pytest.mark.parametrize('data', [b'<article>' + b'<sec>' * 100_000, b'<article><body>' + b'<!--' * 300_000, b'<article><p>' + b'<![CDATA[' * 200_000, b'<!DOCTYPE ' + b'[' * 300_000,
                                  b'<!--' * 300_000, b'<article><p>' + b'Fig. 1, ' * 100_000 + b'</p></article>', b'<article><p>' + b'a. B ' * 200_000 + b'</p></article>',
                                  b'<article><p>Fig 1' + b'-' * 300_000 + b'</p></article>', b'<article><p>Fig. ' + b'1 ' * 300_000, b'<article><p>x' + b'&' * 300_000])
def test_hostile_text_costs_no_time(data):
    start = time.time()
    try: A.article_records(data, 'toy.xml')
    except A.ArticleError as e: assert 'toy.xml' in str(e)
    assert time.time() - start < 5


@pytest.mark.parametrize('tag', ['bold', 'sec', 'fig', 'xref', 'caption', 'sub-article'])
def test_deep_nesting(tag, tmp_path):
    (tmp_path/'deep.xml').write_text('<article><body><p>' + f'<{tag} rid="F1" id="F1">' * 3000 + 'x' + f'</{tag}>' * 3000 + '</p></body></article>')
    notes = []
    try: A.read_article(tmp_path/'deep.xml', notes=notes)
    except A.ArticleError as e: notes.append(str(e))
    assert notes and 'deep.xml' in notes[-1] and '\n' not in notes[-1]


def test_hostile_text_with_a_figure_costs_no_time():
    many = '<p>' + f'See {x("F1", "Fig. 1")} and Fig. 1. ' * 5_000 + '</p>'
    start = time.time()
    r, = article(many, fig(caption='<p>' + '(a) ' * 50_000 + '</p>'))
    assert len(r['mentions']) == 5_000 and time.time() - start < 5


# The summary

def test_a_summary_counts_articles_and_figures_and_knows_one_from_many(tmp_path, capsys):
    import io, tarfile
    def text(n): return (f'<article {XLINK}><front><article-meta><article-id pub-id-type="pmc">{n}</article-id></article-meta></front><body><p>See Figure 1.</p>'
                         + fig('F1', inside=graphic('g1')) + '</body></article>').encode()
    (tmp_path/'a.xml').write_bytes(text(1))
    with tarfile.open(tmp_path/'two.tar.gz', 'w:gz') as t:
        for n in (12, 123):
            info = tarfile.TarInfo(f'PMC{n}/a.nxml'); info.size = len(text(n))
            t.addfile(info, io.BytesIO(text(n)))
    assert A.figures([tmp_path/'a.xml'], tmp_path/'out.jsonl') == 0
    assert capsys.readouterr().out.startswith('1 article, 1 figure, 0 with image, 1 with mentions, 0 problems -> ')
    assert A.figures([tmp_path/'two.tar.gz'], tmp_path/'out.jsonl') == 0
    assert capsys.readouterr().out.startswith('2 articles, 2 figures, 0 with image, 2 with mentions, 0 problems -> ')
    A.figures([tmp_path/'two.tar.gz', tmp_path/'a.xml', tmp_path/'none.xml'], tmp_path/'out.jsonl')
    assert '3 articles, 3 figures, 0 with image, 3 with mentions, 1 problem -> ' in capsys.readouterr().out
