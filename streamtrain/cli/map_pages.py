"""``streamtrain visualize`` pca, similarity, matches and attention: compute maps of images and draw them."""

from __future__ import annotations

import argparse

from PIL import Image

from streamtrain.cli.backbone import choose_device, load_selected_backbone
from streamtrain.cli.visualize import is_html
from streamtrain.data.still_images import Still, as_picture, decode_image, still_size
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.maps import (
    cls_attention,
    fit_to_patches,
    foreground_components,
    foreground_masks,
    map_size,
    patch_features,
    principal_components,
    similarity_maps,
)
from streamtrain.evaluation.matching import mutual_matches
from streamtrain.evaluation.pages import attention_page, matches_page, pca_page, similarity_page
from streamtrain.evaluation.similarity_html import similarity_html
from streamtrain.interop.folder import BackboneConfig

# shorter side in pixels of an image on the page: as in the network's input, within these bounds
MIN_SHOWN, MAX_SHOWN = 400, 1024


def draw_maps(arguments: argparse.Namespace) -> Image.Image | bytes:
    """Return a picture, or with a path to an HTML file a page for a browser."""
    device = choose_device(arguments.device)
    backbone = load_selected_backbone(arguments)
    config = backbone.config
    originals = [decode_image(path, path, config.background, config.pixels) for path in arguments.image]
    patch_size = config.model.patch_size
    size = arguments.size or map_size(config.image_size, patch_size)
    if size < patch_size:
        raise StreamtrainError(f"--size {size} is less than one patch of {patch_size} pixels")
    model = backbone.model.to(device)
    inputs = [fit_to_patches(image, size, patch_size) for image in originals]
    # resize the originals, which have more detail than the network's input
    shown = [
        as_picture(original, config.value_range).resize(shown_size(image), Image.Resampling.LANCZOS)
        for original, image in zip(originals, inputs, strict=True)
    ]
    names = [path.name for path in arguments.image]
    subtitle = describe(arguments, config, inputs[0])
    if arguments.kind == "attention":
        maps = [cls_attention(model, image, config.mean, config.std, config.value_range) for image in inputs]
        return attention_page(shown, names, maps, subtitle, arguments.smooth)
    features = [patch_features(model, image, config.mean, config.std, config.value_range) for image in inputs]
    if arguments.kind == "matches":
        masks = foreground_masks(features) if arguments.foreground else None
        matches = mutual_matches(features[0], features[1], arguments.count, masks)
        if not len(matches):
            raise StreamtrainError("no foreground patch has a match in the other image's foreground; omit --foreground")
        if is_html(arguments.out):
            best = (int(matches.first[0, 0]), int(matches.first[0, 1]))
            return similarity_html(shown, names, features, best, subtitle, matches=matches)
        low, high = matches.similarity[-1], matches.similarity[0]
        found = f"{subtitle} · {len(matches)} matches, similarity {low:.2f} to {high:.2f}"
        grids = [(feature.shape[0], feature.shape[1]) for feature in features]
        return matches_page(shown, names, grids, matches, found)
    if arguments.kind == "pca":
        components = foreground_components(features) if arguments.foreground else principal_components(features)
        return pca_page(shown, names, components, subtitle, arguments.smooth, arguments.foreground)
    patches = arguments.patch or [(features[0].shape[0] // 2, features[0].shape[1] // 2)]
    if is_html(arguments.out):
        if len(patches) > 1:
            raise StreamtrainError("an HTML page starts with one --patch; others are chosen in the browser")
        return similarity_html(shown, names, features, patches[0], subtitle, arguments.smooth)
    similarities = [similarity_maps(features, patch) for patch in patches]
    return similarity_page(shown, names, similarities, patches, subtitle, arguments.smooth)


def shown_size(image: Still) -> tuple[int, int]:
    """Return (width, height) in pixels of an image on the page."""
    width, height = still_size(image)
    side = min(width, height)
    scale = min(max(side, MIN_SHOWN), MAX_SHOWN) / side
    return round(width * scale), round(height * scale)


def describe(arguments: argparse.Namespace, config: BackboneConfig, image: Still) -> str:
    """Return the page's subtitle: the network and the patch grid of the first image."""
    if arguments.untrained:
        network = "untrained network"
    elif isinstance(config.origin.get("step"), int):
        network = f"{config.origin.get('source')}, step {config.origin['step']}"
    else:
        network = (arguments.weights or arguments.run).name
    patch_size = config.model.patch_size
    width, height = still_size(image)
    rows, columns = height // patch_size, width // patch_size
    return f"{network} · {rows} x {columns} patches of {patch_size} px"
