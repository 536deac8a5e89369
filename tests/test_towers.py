"What a bare tower is assumed to have seen, and what its own files say."
import json

import numpy as np
import pytest
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, SiglipImageProcessor

from llava_med.models.anatomy import assumed_settings
from llava_med.models.convert import convert
from llava_med.models.llava import join, load, read_tower, save
from test_convert import Original
from test_llava import language, tower

CLIP, HALF, IMAGENET = ((.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)), ((.5,)*3, (.5,)*3), ((.485, .456, .406), (.229, .224, .225))
FAMILIES = {'clip': CLIP, 'siglip': HALF, 'dinov2': IMAGENET, 'vit': HALF}


def pixels(processor):
    "What the tower gets of a white picture."
    return processor.image_processor(Image.new('RGB', (64, 64), 'white'), return_tensors='pt')['pixel_values']


@pytest.mark.parametrize('kind', FAMILIES)
def test_a_bare_tower_gets_the_settings_of_its_family_and_a_line(kind, tmp_path):
    f, said = tower(tmp_path/'t', kind), []
    images = read_tower(f, say=said.append)[3]
    mean, std = FAMILIES[kind]
    assert np.allclose(images['image_mean'], mean) and np.allclose(images['image_std'], std) and images['rescale_factor'] == 1/255
    assert len(said) == 1 and str(f) in said[0] and 'assumed' in said[0] and f'{mean[0]:.3f}' in said[0] and f'{std[2]:.3f}' in said[0]
    said.clear()
    model, processor = join(f, language(tmp_path/'l'), say=said.append)
    assert sum('assumed' in s for s in said) == 1 and np.allclose(processor.image_processor.image_mean, mean)
    kept = model.provenance['image_settings']
    assert np.allclose(kept['image_mean'], mean) and kept['pad'] is True and 'resample' in kept
    again = load(save(model, processor, tmp_path/'m'))[1]
    assert np.allclose(pixels(again), pixels(processor)) and np.isclose(float(pixels(again).max()), max((1 - m)/s for m, s in zip(mean, std)), atol=1e-3)


@pytest.mark.parametrize('kind, made', [('clip', CLIPImageProcessor(image_mean=[.1]*3, image_std=[.9]*3, resample=2)), ('siglip', SiglipImageProcessor(image_mean=[.2]*3)),
                                        ('dinov2', BitImageProcessor(image_mean=[.53]*3, image_std=[.25]*3, rescale_factor=1/127.5)), ('siglip', SiglipImageProcessor(do_normalize=False))])
def test_what_its_files_say_goes_before(kind, made, tmp_path):
    f, said = tower(tmp_path/'t', kind), []
    made.save_pretrained(f)
    images = read_tower(f, say=said.append)[3]
    assert not said and {k: images[k] for k in ('image_mean', 'image_std', 'resample', 'rescale_factor', 'do_normalize')} == \
        {k: getattr(made, k) for k in ('image_mean', 'image_std', 'resample', 'rescale_factor', 'do_normalize')}
    processor = join(f, language(tmp_path/'l'), say=said.append)[1]
    assert processor.image_processor.rescale_factor == made.rescale_factor and processor.image_processor.do_normalize == made.do_normalize


@pytest.mark.parametrize('text', ['{"image_mean": [', '', '[]'])
def test_a_damaged_file_is_not_taken_for_a_missing_one(text, tmp_path):
    f = tower(tmp_path/'t', 'siglip')
    (f/'preprocessor_config.json').write_text(text)
    with pytest.raises(ValueError, match='cannot be read as a vision tower') as e: read_tower(f)
    assert str(f) in str(e.value) and '\n' not in str(e.value)


def test_families():
    kinds = dict(clip_vision_model=CLIP, siglip_vision_model=HALF, siglip2_vision_model=HALF, dinov2=IMAGENET, dinov2_with_registers=IMAGENET, dinov3_vit=IMAGENET,
                 vit=HALF, vit_mae=IMAGENET, vit_msn=IMAGENET, deit=IMAGENET, beit=HALF, ijepa=IMAGENET, unheard_of=CLIP)
    for kind, (mean, std) in kinds.items():
        whose, said = assumed_settings(kind)
        assert np.allclose(said['image_mean'], mean) and np.allclose(said['image_std'], std), kind
    assert assumed_settings('unheard_of')[0] == "CLIP's"


def test_a_conversion_says_it_too(tmp_path):
    original, said = Original(tmp_path/'src', own=False, shards=1), []
    original.tower.save_pretrained(tmp_path/'clip')
    convert(tmp_path/'src', tmp_path/'dst', tmp_path/'clip', say=said.append)
    assert any("CLIP's mean and deviation are assumed" in s for s in said)
    assert json.loads((tmp_path/'dst/provenance.json').read_text())['image_settings']['image_mean'][0] == pytest.approx(.4815, abs=1e-3)
