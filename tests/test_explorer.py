"The explorer's page: what goes in comes out, and nothing else happens; in a browser, what a person can do with it."
import json
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import NO_BROWSER, browser, wait_for
from llava_med.explain.explorer import (CHEAP, best_lines, best_maps, explained, explorer_page,
    map_reliability, pack_maps, shown_methods, unpack_maps, write_explorer)
from llava_med.explain.maps import METHOD_FACTS
from llava_med.core.runs import OutputError

in_browser = [pytest.mark.slow, pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER)]
until = partial(wait_for, seconds=30)
EVIL = '</script><script>document.title="broken"</script><img src=x onerror=alert(1)>\u2028'


def picture(seed=0, size=(256, 192)):
    "Noise with a bright square."
    a = np.random.default_rng(seed).integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
    a[24:72, 160:208] = 230
    return Image.fromarray(a)


def answer(words=('whole answer', 'upper', 'right'), methods=('attention', 'relevancy', 'tam', 'pixel_gradient'), seed=0):
    "Maps of 6 × 8 cells whose peak wanders with word and layer."
    rng, maps = np.random.default_rng(seed), {}
    for k in methods:
        m = rng.random((len(words), 1 if k in ('tam', 'pixel_gradient') else 4, 6, 8))
        for w in range(len(words)):
            for l in range(m.shape[1]): m[w, l, l + 1, w + 2] = 3
        maps[k] = m
    return dict(answer=' '.join(words[1:]), words=list(words), maps=maps, window=(0, 0, 1, 1), grid=(6, 8))


def rows(model='stage2'):
    "Rows in which relevancy is good and attention is not."
    def row(method, metric, baseline, value, low, high, layer=2):
        return dict(model=model, method=method, layer=layer, metric=metric, baseline=baseline, value=value, low=low, high=high, n_items=9, n_images=8)
    out = [row('random', 'pointing', '', .05, .04, .06, ''), row('relevancy', 'pointing', '', .9, .7, 1), row('attention', 'pointing', '', .2, .1, .4)]
    for k, v in (('relevancy', (.4, .2, .6)), ('attention', (.1, -.2, .3))):
        out += [row(k, f'{c}.{u}.mean', b, *v) for c in ('deletion', 'insertion') for b in ('random', 'centre') for u in ('tokens', 'pixels')]
    return out


def question(i=0, **kw):
    return {**dict(question=f'where is nodule {i}?', right='upper right', image=picture(i), name=f'{i}.jpg', boxes=[(.6, .1, .2, .25)],
                   answers={m: answer(seed=k) for k, m in enumerate(('base', 'stage1', 'stage2'))}), **kw}


def data(html): return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def page(n=3): return explorer_page([question(i) for i in range(n)], rows(), notes={'stage1': 'Not measured: 0 of 40 questions pass the gates.'})


def test_maps_survive_their_bytes():
    d = data(page())
    for m, a in d['questions'][1]['answers'].items():
        for k, p in a['maps'].items(): assert np.abs(unpack_maps(p) - answer(seed=['base', 'stage1', 'stage2'].index(m))['maps'][k]).max() < 3/250
    assert {o['name']: o['of'] for o in d['methods']} == {k: METHOD_FACTS[k]['of'] for k in ('attention', 'relevancy', 'tam', 'pixel_gradient')}
    signed = np.array([[-2., 0], [1, 5]])[None, None]
    assert np.abs(unpack_maps(pack_maps(signed)) - signed).max() < 7/255


def test_what_is_not_a_map_is_refused():
    for bad in (np.nan, np.inf):
        found = answer()
        found['maps']['relevancy'][0, 1, 2, 3] = bad
        with pytest.raises(ValueError, match='stage2, relevancy: the map holds NaN'): explorer_page([question(answers=dict(stage2=found))])
    short = answer()
    short['maps']['tam'] = short['maps']['tam'][:1]
    for q, words in ((question(answers=dict(base=short)), '1 maps for 3 words'),
                     (question(answers=dict(base=answer(), stage2=dict(answer(), window=(0, 0, .5, 1)))), '2 different parts')):
        with pytest.raises(ValueError, match=words): explorer_page([q])
    with pytest.raises(ValueError, match='No question'): explorer_page([])
    with pytest.raises(ValueError, match='No answer has a map'): explorer_page([question(answers=dict(base=dict(answer(), answer='', words=[], maps={})))])
    with pytest.raises(ValueError, match='shape'): pack_maps(np.zeros((2, 2)))


def test_text_stays_text():
    html = explorer_page([question(question=EVIL, right=EVIL, name=EVIL, answers={EVIL: dict(answer(words=('whole answer', EVIL)), answer=EVIL)})],
                         notes={EVIL: EVIL}, title=EVIL, lead=[EVIL])
    assert html.count('<script') == 2 and html.count('</script>') == 2 and '<img' not in html and '\u2028' not in html.split('id="data">')[1]
    d = data(html)
    assert d['questions'][0]['question'] == EVIL and d['models'] == [EVIL] and d['notes'] == {EVIL: EVIL}


def test_nothing_is_fetched_and_the_size_is_bounded(tmp_path):
    html = page()
    assert not re.search('https?:|//[a-z]+[.]|@import|url\\(|fetch\\(|XMLHttp|WebSocket', re.sub(r'base64,[\w+/=]*', '', html.split('id="data">')[0] + html.split('</script>')[1]))
    assert "default-src 'none'" in html and 'Research and teaching only' in html
    with pytest.raises(OutputError, match='fewer questions'): write_explorer(tmp_path/'x.html', html, limit=10_000)
    for bad in ('<script src="x.js">', '<a href=x.html>', '<img src="http' + '://x.org/y.png">'):
        with pytest.raises(OutputError, match='not inside'): write_explorer(tmp_path/'x.html', html + bad)
    assert not list(tmp_path.iterdir())
    size = write_explorer(tmp_path/'explorer.html', html).stat().st_size
    assert size < 400_000


def test_twenty_questions_are_small():
    full = {k: np.random.default_rng(0).random((7, 4, 8, 8)) for k in CHEAP}
    a = dict(answer='a b c d e f', words=['whole answer', *'abcdef'], maps=full, window=(0, 0, 1, 1))
    html = explorer_page([question(i, answers=dict(base=a, stage1=a, stage2=a, tuned=a)) for i in range(20)])
    assert len(html.encode()) < 5_000_000
    assert len(data(explorer_page([question(name='one') for _ in range(5)]))['pictures']) == 1, 'a picture is put in once'


def test_reliability_is_read_and_never_mixed():
    d = data(page())
    r = d['reliability']['stage2']
    assert r['relevancy']['confirmed'] and not r['attention']['confirmed'] and r['relevancy']['layer'] == 2 and d['first'] == 'relevancy'
    assert list(r['relevancy']['gains']) == ['tokens', 'pixels'] and list(d['reliability']) == ['stage2']
    pixels = [dict(o, method='occlusion') for o in rows() if o['method'] == 'relevancy']
    assert list(map_reliability(pixels)['stage2']['occlusion']['gains']) == ['pixels'], 'a map of pixels is not judged by tokens'
    assert any('no map beats' in t for t in best_lines(rows())['stage2'][1:]) and 'relevancy' in best_lines(rows())['stage2'][0]
    gone = map_reliability([dict(o, value=float('nan'), low=float('nan'), high=float('nan')) if '.' in o['metric'] else o for o in rows()])
    assert gone['stage2']['relevancy']['verdict'].startswith('Not measured')


def test_rows_from_a_file_are_the_same(tmp_path):
    from csv import DictReader
    from llava_med.explain.faithfulness import FAITHFULNESS_COLUMNS
    from llava_med.core.runs import write_csv
    write_csv(tmp_path/'faithfulness.csv', rows(), FAITHFULNESS_COLUMNS)
    with open(tmp_path/'faithfulness.csv', newline='') as f: assert map_reliability(list(DictReader(f))) == map_reliability(rows())


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="no map method named 'eyes'"): explained(None, None, picture(), 'what?', methods=['eyes'])


# In a browser

@pytest.fixture(scope='module')
def opened(tmp_path_factory):
    "The page in a browser without network; LLAVA_MED_EXPLORER names another page than the toy."
    path = os.environ.get('LLAVA_MED_EXPLORER') or write_explorer(tmp_path_factory.mktemp('page')/'explorer.html', page(20))
    with browser(1300, 1250, browser='ALL') as d:
        d.execute_cdp_cmd('Network.enable', {})
        d.execute_cdp_cmd('Network.emulateNetworkConditions', dict(offline=True, latency=0, downloadThroughput=0, uploadThroughput=0))
        d.get(Path(path).resolve().as_uri())
        yield d


def pixels(d, n=0): return d.execute_script('return document.querySelectorAll(".panel canvas")[arguments[0]].toDataURL()', n)
def said(d): return [e.text for e in d.find_elements('css selector', '.panel [aria-live]')]


@pytest.mark.parametrize('_', [pytest.param(0, marks=in_browser)])
def test_a_person_with_a_keyboard(opened, shots, _):
    from selenium.webdriver.common.keys import Keys
    d = opened
    ready = int(until(lambda: d.execute_script('return document.documentElement.dataset.ready')))
    spent = d.execute_script('const t = performance.now(); go(0); draw(); return performance.now() - t')
    print(f'ready {ready} ms after the page was asked for; a question is drawn in {spent:.0f} ms')
    assert ready < float(os.environ.get('LLAVA_MED_PATIENCE', 1000)) and len(d.find_elements('css selector', '.panel')) == 2
    toy = 'nodule 0' in d.find_element('id', 'question').text
    until(lambda: len(set(pixels(d, 1))) > 10)
    # a word: Tab to it, Enter
    words = d.find_elements('css selector', '.panel:last-child .words button')
    before, text = pixels(d, 1), said(d)[-1]
    if len(words) > 1:
        words[0].send_keys(Keys.TAB)
        assert d.switch_to.active_element == words[1]
        d.switch_to.active_element.send_keys(Keys.ENTER)
        assert words[1].get_attribute('aria-pressed') == 'true' and pixels(d, 1) != before and f'“{words[1].text}”' in said(d)[-1] != text
        if toy: assert d.find_elements('css selector', '.panel:first-child [aria-pressed=true]')[0].text == words[1].text, 'the same word of the other model'
        words[0].click()
        assert pixels(d, 1) == before
    # the layer: arrow keys
    layer = d.find_element('id', 'layer')
    at = layer.get_attribute('value')
    layer.send_keys(Keys.ARROW_LEFT if at != '0' else Keys.ARROW_RIGHT)
    assert layer.get_attribute('value') != at and pixels(d, 1) != before and f'layer {layer.get_attribute("value")}' in said(d)[-1]
    if toy: assert 'was not measured' in d.find_element('css selector', '.panel:last-child').text
    d.save_screenshot(str(shots/'explorer_desktop.png'))
    # the method: arrow keys inside the group of radio buttons
    on = d.find_element('css selector', 'input[name=method]:checked')
    first, before = on.get_attribute('value'), pixels(d, 1)
    on.send_keys(Keys.ARROW_RIGHT)
    assert d.find_element('css selector', 'input[name=method]:checked').get_attribute('value') != first and pixels(d, 1) != before
    pixel = d.find_element('css selector', '#pixels input')
    pixel.send_keys(Keys.SPACE)
    assert {e.text for e in d.find_elements('css selector', '.claim')} == {'Pixel that mattered'}
    # compare: all models, then one; never none
    for box in d.find_elements('css selector', '#models input'):
        if not box.is_selected(): box.send_keys(Keys.SPACE)
    n = len(d.find_elements('css selector', '#models input'))
    assert len(d.find_elements('css selector', '.panel')) == n
    d.find_element('css selector', f'#tokens input[value={first}]').send_keys(Keys.SPACE)
    assert {e.text for e in d.find_elements('css selector', '.claim')} == {'Token used by the language model'}
    d.find_elements('css selector', '.panel details summary')[-1].send_keys(Keys.ENTER)
    until(lambda: len(d.find_elements('css selector', '.panel:last-child details table tbody tr')) >= 6)
    d.save_screenshot(str(shots/'explorer_compare.png'))
    for box in d.find_elements('css selector', '#models input'): box.send_keys(Keys.SPACE)
    assert len(d.find_elements('css selector', '.panel')) == 1
    d.find_element('id', 'next').send_keys(Keys.ENTER)
    assert d.find_element('id', 'question').get_attribute('value') == '1'
    d.find_element('id', 'before').click()


@pytest.mark.parametrize('_', [pytest.param(0, marks=in_browser)])
def test_the_map_that_is_recommended_is_one_button_away(opened, _):
    d = opened
    until(lambda: d.execute_script('return document.documentElement.dataset.ready'))
    radio = lambda: d.find_element('css selector', 'input[name=method]:checked')
    best = radio().get_attribute('value')
    offers = lambda: [e for e in d.find_elements('xpath', '//button[.="Show this map"]')]
    shown = len(offers())
    other = next(e for e in d.find_elements('css selector', 'input[name=method]') if e.get_attribute('value') != best)
    other.click()
    assert len(offers()) == shown + 1
    offers()[-1].send_keys(' ')
    assert radio().get_attribute('value') == best and d.switch_to.active_element == radio() and len(offers()) == shown


def test_a_page_holds_the_map_that_it_recommends():
    dear = [dict(o, method='occlusion') if o['method'] == 'relevancy' else o for o in rows()]
    assert shown_methods() == list(CHEAP)
    (name, words), *_ = best_maps(rows())['stage2']
    assert name == 'relevancy' and 'believe relevancy' in words and best_lines(rows())['stage2'][0] == words
    assert set(shown_methods(dear)) - set(CHEAP) == {m for m, _ in best_maps(dear)['stage2'] if m} - set(CHEAP)


@pytest.mark.parametrize('_', [pytest.param(0, marks=in_browser)])
def test_names_and_network(opened, _):
    d = opened
    unnamed = d.execute_script('''return [...document.querySelectorAll("button,select,input,canvas,[role=region]")].filter(e => !(e.textContent.trim() ||
        e.getAttribute("aria-label") || (e.labels && e.labels.length && e.labels[0].textContent.trim()))).map(e => e.outerHTML)''')
    assert not unnamed
    assert all(r.startswith(('data:', 'file:')) for r in d.execute_script('return performance.getEntriesByType("resource").map(r => r.name)'))
    assert not [o for o in d.get_log('browser') if o['level'] == 'SEVERE' and 'favicon' not in o['message']]


@pytest.mark.parametrize('dark', [pytest.param(v, marks=in_browser) for v in (False, True)])
def test_phone_and_dark(opened, shots, dark):
    d = opened
    d.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')]))
    d.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=390, height=1800, deviceScaleFactor=1, mobile=True))
    assert d.execute_script('return document.documentElement.scrollWidth') <= 390, 'nothing sticks out on a phone'
    d.save_screenshot(str(shots/f'explorer_phone_{"dark" if dark else "light"}.png'))
    d.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
    d.save_screenshot(str(shots/f'explorer_{"dark" if dark else "light"}.png'))


@pytest.mark.parametrize('_', [pytest.param(0, marks=in_browser)])
def test_hostile_text_in_a_browser(opened, tmp_path, _):
    d, html = opened, explorer_page([question(question=EVIL, right=EVIL, answers={EVIL: dict(answer(words=('whole answer', EVIL)), answer=EVIL)})], title='calm')
    here = d.current_url
    d.get(write_explorer(tmp_path/'evil.html', html).as_uri())
    assert until(lambda: d.execute_script('return document.documentElement.dataset.ready')) and d.title == 'calm' and not d.find_elements('css selector', 'img')
    assert EVIL.strip() in d.find_element('css selector', '.panel').get_attribute('textContent')
    d.get(here)
