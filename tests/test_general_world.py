"The general world of the base and the phantoms have nothing in common but words."
import inspect
import re

import numpy as np

from llava_med.core.vocabulary import FINDINGS, PLURALS
from llava_med.world import general_world, language, render, scenes
from llava_med.world.scenes import sample_scene

WORDS = r'\w+(?:-\w+)*'


def masked(text, words):
    "A sentence with its medical and spatial words taken out: what is left is the template."
    text = re.sub(r'\s+', ' ', text.lower())
    for w in sorted(words, key=len, reverse=True): text = re.sub(rf'\b{re.escape(w)}(?:s|es)?\b', '*', text)
    return re.sub(r'[\d]+', '*', text).strip(' .')


def medical_words():
    kinds = {n for group in FINDINGS.values() for names in group.values() for n in names}
    kinds |= {n for group in FINDINGS.values() for n in group} | {f[0] for f in general_world.FACTS}
    kinds |= set(PLURALS.values()) | set(general_world.ODD_PLURALS.values())
    return kinds | {'one', 'two', 'three', 'four', 'small', 'large', 'left', 'right', 'upper', 'lower'}


def sentences(texts): return {s for t in texts for s in re.split(r'(?<=[.;:])\s+', t)}


def test_no_caption_template_is_shared():
    words = medical_words()
    theirs = [language.captions(sample_scene(i), style) for i in range(400) for style in ('brief', 'detailed')]
    ours = [c for i in range(400) for c in general_world.world_sample(i)['captions']]
    ours += [t for i in range(800) for role, t in general_world.report_text(i) + general_world.plain_text(i) if role == 'assistant' and len(t.split()) > 4]
    theirs, ours = ({masked(s, words) for s in sentences(x)} for x in (theirs, ours))
    shared = {s for s in theirs & ours if len(re.findall(WORDS, s.replace('*', ''))) > 3}
    assert not shared, sorted(shared)[:10]


def test_the_template_check_can_fail():
    words = medical_words()
    assert masked('Two small nodules were painted over the wall.', words) == masked('One large cyst were painted over the wall.', words)


def test_no_drawing_routine_is_shared():
    def functions(m): return {inspect.getsource(f) for f in vars(m).values() if inspect.isfunction(f) and f.__module__ == m.__name__}
    assert not functions(general_world) & (functions(render) | functions(scenes))
    assert 'phantom' not in inspect.getsource(general_world)
    assert 'general_world' not in ' '.join(re.findall(r'import.*', inspect.getsource(render) + inspect.getsource(scenes)))


def test_pictures_are_of_other_places():
    "A phantom and a picture of the general world never agree pixel by pixel."
    a, b = general_world.world_sample(0)['image'], render.render(sample_scene(0), 96)
    assert np.abs(a.astype(int) - b).mean() > 10
