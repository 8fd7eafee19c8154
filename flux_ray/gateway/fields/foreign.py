"""List what other servers call their fields; each dialect takes its part of this one table.

A field that decides what is in the image, its shape, or how many there are takes effect under every
name whose meaning is clear (`SAME`, `IMAGES`, `MASKS`, `CONTROLS`), else it is refused by name
(`REFUSED`).
Fields that tune how a model gets there, safety flags and bookkeeping are ignored, and named in
warnings (`NO_EFFECT`).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from flux_ray.errors import BadRequest
from flux_ray.gateway.images.sources import is_image, is_url


def names_in(text: str) -> frozenset[str]:
    """Return the set of words in a text."""
    return frozenset(text.split())


# Our name of a field, and what other servers call it.
SAME: dict[str, tuple[str, ...]] = {
    ours: tuple(others.split())
    for ours, others in {
        "prompt": "text_prompt positive_prompt",
        "n": "num_images num_outputs num_images_per_prompt number_of_images num_image num_samples"
        " n_samples n_images samples image_count images_count sample_count batch_size batch_count"
        " n_iter",
        "num_inference_steps": "steps step inference_steps num_steps sampling_steps sample_steps",
        "guidance_scale": "guidance cfg_scale cfg distilled_guidance",
        "negative_prompt": "negative",
        "true_cfg_scale": "true_cfg true_guidance_scale",
        # 1 replaces all of the image under the mask. Where 1 means to keep it: DISTANCES.
        "strength": "prompt_strength denoising_strength denoise denoise_strength",
        "allow_truncation": "",
        "size": "image_size dimensions output_size",
        "width": "image_width output_width w",
        "height": "image_height output_height h",
        "aspect_ratio": "ratio aspect image_aspect_ratio output_aspect_ratio",
        "resolution": "megapixels output_megapixels",
        "seed": "random_seed noise_seed manual_seed",
        "output_format": "format image_format output_type file_format output_mime_type mime_type",
        "output_compression": "output_quality jpeg_quality",
        "prompt_upsampling": "enhance_prompt prompt_enhancement prompt_enhance expand_prompt"
        " prompt_expansion enable_prompt_expansion prompt_extend upsample_prompt rewrite_prompt",
    }.items()
}
# Names of references; `image2` and `image_2` are ordered by their numbers.
IMAGES = names_in(
    "image images url urls ref_images reference_image image_url image_urls images_url"
    " images_urls input_image input_images input_image_url input_image_urls input_url"
    " input_urls input_reference input_references reference_images reference_image_url"
    " reference_image_urls reference_url reference_urls references ref_image ref_image_url"
    " ref_image_urls ref_url init_image init_images init_image_url source_image source_images"
    " source_image_url source_url image_file image_files image_data image_base64 image_b64"
    " base64_image img img_url imgs file files file_url image_prompt image_prompts image_prompt_url"
)
MASKS = names_in(
    "mask mask_image mask_url mask_image_url image_mask mask_img mask_file mask_data"
    " mask_base64 mask_b64 inpaint_mask inpainting_mask"
)
# Names of the edges or depths that an image is to follow.
CONTROLS = names_in(
    "control_image control_images control_image_url control_lora_image_url preprocessed_image"
    " preprocessed_image_url canny_image depth_image edge_image"
)
# Names that ask for what is not served, and what to do instead.
_REASONS = {
    "control_net controlnet controlnets controls control_mode": "ControlNets are not served: send"
    " control_image to a model that takes one",
    "style_image style_images style_image_url style_reference style_reference_images face_image"
    " subject_reference character_reference character_reference_images pose_image redux_image"
    " ip_adapter ip_adapters ip_adapter_image ip_adapter_images markup": "images of a style, a face"
    " or a pose are not served: send image, and say in the prompt what it is for",
    "lora loras lora_url lora_urls lora_weights lora_path hf_lora extra_lora adapter adapters"
    " finetune finetune_id embeddings textual_inversion": "adapters are the operator's here: a"
    " request cannot name any",
    "top bottom left right outpaint expand expand_image zoom_out": "expanding is not served",
    "enable_upscaling upscale upscale_factor upscaling_scale enable_hr hr_scale": "upscaling is not"
    " served: send size",
    "extra_params diffusers_kwargs input parameters provider_options": "fields inside of it are not"
    " read: they belong beside the prompt",
    "invert_mask mask_invert inpainting_mask_invert": "masks are not inverted here",
    "mask_prompt mask_text mask_blur mask_blur_factor": "masks are images here, and as hard as they"
    " are: send mask",
    "prompt_2 prompts text_prompts": "there is one prompt: send prompt",
    "seeds subseed variation_seed": "there is one seed: send seed",
    "style_preset style_id style_codes style_type color_palette": "styles are not served: say it in"
    " the prompt",
    "bboxes bounding_boxes regions regional_prompts": "regions are not served: say it in the"
    " prompt",
    "orientation": "send size, or aspect_ratio like 16:9",
    "tiling seamless": "seamless images are not served",
    "transparent_background transparent remove_background rembg": "transparent backgrounds are not"
    " supported",
    "sequential_image_generation max_images": "series are not served: send n",
    "input_image_blob_path image_path": "paths on the server are not read",
    "file_id file_ids": "files are not kept here: send the image itself",
}
REFUSED = {name: reason for names, reason in _REASONS.items() for name in names.split()}
# How near to stay to an image, where more is nearer, or is counted in a way of its own. 1 is the
# same as none, and without an image none has a meaning.
DISTANCES = names_in(
    "image_strength img_strength image_weight image_guidance_scale init_image_strength"
)
DISTANCE_REASON = "it means different things on different servers: send strength, beside a mask"
# These never change an image; clients send them for the operator's sake, so nobody is warned.
SILENT = frozenset({"safety_identifier"})
NO_EFFECT = DISTANCES | names_in(
    "bot_task complexity disable_safety_checker enable_safety_checker enable_teacache"
    " flow_shift frame_count frame_duration_ms generator_device go_fast"
    " image_prompt_strength input_fidelity layers max_sequence_length moderation"
    " perf_dump_path profile return_stage_metrics safety_checker"
    " safety_tolerance sampler sampler_name scheduler style svg sync_mode system_prompt"
    " task_type upscaling_model_path vae_use_slicing vae_use_tiling canny_low_threshold"
    " canny_high_threshold"
)
EXTRA_BODY = "extra_body"
# Values by which a refused or ineffective field asks for nothing.
ASKS_NOTHING = {"", "0", "0.0", "auto", "disabled", "false", "none", "null", "off"}
# A URL in an unknown field counts as an image's if the field's name has one of these words.
_IMAGE_WORDS = names_in(
    "image images img picture pictures photo photos mask reference references ref refs"
)
MAX_NAME_CHARS = 80
MAX_LOOKED_AT = 50
OURS = {other: ours for ours, others in SAME.items() for other in others}
_KNOWN = frozenset({*SAME, *OURS, *REFUSED, EXTRA_BODY}) | NO_EFFECT | SILENT
_NUMBER = re.compile(r"_?([0-9]{1,2})$")
_LISTED = re.compile(r"\[[0-9]{0,3}\]$")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def snake(name: str) -> str:
    """Return the name in snake case: `image_url` for `imageUrl` and `image-url`."""
    return _CAMEL.sub("_", name).lower().replace("-", "_")


def plain_name(name: str) -> str:
    """Return the name as this table spells it; unchanged if it is not in the table."""
    if len(name) > MAX_NAME_CHARS:
        return name
    plain = snake(name)
    return plain if plain in _KNOWN or has_pixels(plain) else name


def is_image_name(name: str) -> bool:
    """Return whether references are sent under that name: `image`, `image[0]`, `image_2`."""
    # A name may be as long as a body; the patterns are not run on such a one.
    if len(name) > MAX_NAME_CHARS:
        return False
    plain = _LISTED.sub("", name)
    return plain in IMAGES or _NUMBER.sub("", plain) in IMAGES


def is_mask_name(name: str) -> bool:
    """Return whether a mask is sent under that name."""
    return len(name) <= MAX_NAME_CHARS and _LISTED.sub("", name) in MASKS


def is_control_name(name: str) -> bool:
    """Return whether a control image is sent under that name."""
    return len(name) <= MAX_NAME_CHARS and _LISTED.sub("", name) in CONTROLS


def has_pixels(name: str) -> bool:
    """Return whether a reference, a mask or a control image is sent under that name."""
    return is_image_name(name) or is_mask_name(name) or is_control_name(name)


def number_of(name: str) -> int:
    """Return a reference's place among the others, from its name; without a number it is 1."""
    plain = _LISTED.sub("", name)
    # The digits of `image_b64` are no place.
    match = None if plain in IMAGES else _NUMBER.search(plain)
    return 1 if match is None else int(match[1])


def is_nothing(value: Any) -> bool:
    """Return whether a field with that value asks for no more than a missing one."""
    if isinstance(value, str) and len(value) > MAX_NAME_CHARS:
        return False
    return value in ([], {}) or str(value).strip().lower() in ASKS_NOTHING


def holds_image(name: str, value: Any) -> bool:
    """Return whether an unknown field holds an image: its bytes, or a URL if its name says so."""
    may_be_url = bool(_IMAGE_WORDS & set(snake(name[:MAX_NAME_CHARS]).split("_")))
    waiting, num_seen = [value], 0
    while waiting and num_seen < MAX_LOOKED_AT:
        each = waiting.pop()
        num_seen += 1
        if isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
        elif isinstance(each, str):
            text = each[:200].strip()
            if is_image(text) or (may_be_url and is_url(text)):
                return True
    return False


def check_served(
    fields: Mapping[str, Any], named: Callable[[str], str], *, has_images: bool
) -> None:
    """Raise BadRequest for a field that would change the image but is not supported.

    `named` gives the caller's own name of a field, which the error quotes.
    """
    has_images = has_images or any(map(is_image_name, fields))
    for name, value in fields.items():
        reason = refusal_of(name, value, has_images=has_images)
        if reason is not None:
            called = named(name)[:80]
            raise BadRequest(f"{called}: {reason}", called)


def refusal_of(name: str, value: Any, *, has_images: bool) -> str | None:
    """Return why a field that would change the image is refused, or None if it may be sent."""
    if name in DISTANCES:
        is_whole = isinstance(value, str | int | float) and str(value).strip() in ("1", "1.0")
        return DISTANCE_REASON if has_images and not is_whole else None
    if name in REFUSED:
        return None if is_nothing(value) else REFUSED[name]
    if name not in _KNOWN and not has_pixels(name) and holds_image(name, value):
        return "no image is read from this field: send it as image"
    return None
