"""Converts a Pascal VOC folder to a COCO dictionary.

A VOC folder has `Annotations/<stem>.xml`, `JPEGImages/<stem>.<any image suffix>` and `ImageSets/Main/<split>.txt`, one
stem a line. Decisions of the conversion:

Corners: (xmin, ymin, xmax, ymax) are used unchanged, as corners in continuous pixel coordinates, where pixel i covers
[i, i + 1]. COCO's box is (xmin, ymin, xmax - xmin, ymax - ymin). This is right for current tools (LabelImg and similar
ones count from 0; LabelImg only changes a 0 to 1). The original VOC counts pixels from 1 and includes the last one, so
its boxes start one pixel too far right and down, and end at the right place. A file does not show which convention it
follows. One pixel on two sides does less harm than a wrong guess.

Difficult objects become `iscrowd: 1`. With this mark pycocotools counts neither a missed object nor a false positive
on it, like the VOC evaluation. The overlap differs: for a crowd box it is intersection / area of the detection, so a
small detection inside of a difficult object is not a false positive either.

Categories are the sorted class names of all annotation files, not of the split alone, so all splits of a folder have
the same ids. The ids count from 1. The XML's `filename` is not read, because it is often wrong or has no suffix.
"""

import difflib
import os
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from PIL import Image

from retina.convert import checks
from retina.convert.checks import Conversion, is_file, shorten


class _Object(NamedTuple):
    name: str
    box: list[float]  # xmin, ymin, xmax, ymax
    difficult: bool
    description: str  # file and number, for messages


def convert_voc(root: Path, split: str, categories: list[str] | None = None) -> Conversion:
    """Convert one split of a VOC folder.

    Args:
        root: the folder with Annotations/, ImageSets/Main/ and JPEGImages/.
        split: the images listed in ImageSets/Main/<split>.txt. If a line has two columns (class-specific lists),
            the first one is used.
        categories: class names in the order of their ids, which count from 1. At least one must be in an annotation
            file, of any split. Objects of other classes are excluded. None: the sorted names in all annotation files.

    Returns:
        The COCO dictionary (info, images, annotations, categories), with `file_name` relative to JPEGImages/ and
        `bbox` xywh in pixels. One line for each change: a box dropped (without area, or outside of the image), a box
        clipped to the image, an image size corrected, a class excluded, a repeated line of the split. Objects count
        from 1. And the folder JPEGImages/.

    Raises:
        FileNotFoundError: not a VOC folder, no such split, or a line of the split without annotation or image.
        ValueError: an annotation file or an image that is not readable, a stem with two images, or categories that
            are empty, repeated, all in no annotation file, or not written as there. Several problems are reported
            together: their count and the first ten.
    """
    split_file = _check_folder(root, split)
    image_files = _find_images(root / "JPEGImages")
    if categories is None:
        categories = _class_names(root / "Annotations")
    checks.check_names(categories, root)
    category_ids = {name: index for index, name in enumerate(categories, start=1)}

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    notes: list[str] = []
    problems: list[ValueError | OSError] = []
    found: set[str] = set()
    excluded: Counter[str] = Counter()
    for where, stem in _read_split(split_file, root / "Annotations", notes):
        try:
            image, objects = _read_image(root, where, stem, image_files[stem], notes)
        except (ValueError, FileNotFoundError) as error:
            problems.append(error)
            continue
        image["id"] = len(images) + 1
        images.append(image)
        for name, box, difficult, description in objects:
            found.add(name)
            if name not in category_ids:
                excluded[name] += 1
                continue
            description = f"{description} ({shorten(name)})"
            if box[2] <= box[0] or box[3] <= box[1]:
                shown = checks.format_box(box)
                notes.append(f"dropped: {description}, box {shown}: xmax <= xmin or ymax <= ymin")
                continue
            clipped = checks.clip(box, image["width"], image["height"], description, notes)
            if clipped is not None:
                checks.add_annotation(annotations, image["id"], category_ids[name], clipped, difficult)
    checks.raise_together(problems, root)
    if not found.issuperset(categories):  # the files of the other splits may have the rest
        notes += _check_known(categories, root / "Annotations")

    for name, count in sorted(excluded.items()):
        notes.append(f"excluded: {count} objects of class {shorten(name)}, which is not one of {categories}")
    name = Path(os.path.abspath(root)).name  # noqa: PTH100 - Path.resolve raises RuntimeError for a circle of links
    coco = {
        "info": checks.info(f"{name} {split}", "Pascal VOC"),
        "images": images,
        "annotations": annotations,
        "categories": checks.categories_list(categories),
    }
    return Conversion(coco, notes, root / "JPEGImages")


def _read_image(
    root: Path, where: str, stem: str, image_files: list[Path], notes: list[str]
) -> tuple[dict[str, Any], list[_Object]]:
    """The COCO entry of an image, without its id, and its objects."""
    xml_file = root / "Annotations" / f"{stem}.xml"
    if not is_file(xml_file):
        raise FileNotFoundError(f"{where}: no annotation; looked for {checks.brief(xml_file)}")
    image_file = _single_image(image_files, where, root / "JPEGImages" / stem)
    xml = _parse(xml_file)
    width, height = _image_size(xml, xml_file, image_file, notes)
    elements = xml.findall("object")  # only direct children: the <part>s of persons in VOC have names and boxes too
    objects = [
        _read_object(element, f"{xml_file}: object {number} of {len(elements)}")
        for number, element in enumerate(elements, start=1)
    ]
    return {"id": 0, "file_name": image_file.name, "width": width, "height": height}, objects


def _check_folder(root: Path, split: str) -> Path:
    """The file of the split. FileNotFoundError if a folder or the file is missing."""
    expected = [root / "Annotations", root / "ImageSets" / "Main", root / "JPEGImages"]
    missing = [f"{path.relative_to(root)}/" for path in expected if not checks.is_folder(path)]
    if missing:
        raise FileNotFoundError(
            f"{root} is not a VOC folder: expected Annotations/ (XML files), ImageSets/Main/ (a .txt per "
            f"split) and JPEGImages/ in it; missing: {', '.join(missing)}"
        )
    split_file = root / "ImageSets" / "Main" / f"{split}.txt"
    if not is_file(split_file):
        known = ", ".join(sorted(path.stem for path in split_file.parent.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"no split {shorten(split)}: looked for {split_file}; available splits: {known}")
    return split_file


def _read_split(split_file: Path, annotation_folder: Path, notes: list[str]) -> list[tuple[str, str]]:
    """(position for messages, stem) of each line. A stem may contain spaces if its annotation file exists."""
    lines: dict[str, str] = {}
    for number, line in enumerate(checks.read_lines(split_file), start=1):
        if not line:
            continue
        stem = line if is_file(annotation_folder / f"{line}.xml") else line.split()[0]
        where = f"{split_file}, line {number} ({shorten(line)})"
        if stem in lines:
            notes.append(f"repeated: {where}: used once")
        else:
            lines[stem] = where
    if not lines:
        raise ValueError(f"{split_file} is empty: expected one image name per line, without suffix")
    return [(where, stem) for stem, where in lines.items()]


def _find_images(folder: Path) -> defaultdict[str, list[Path]]:
    """Stem -> its image files. The folder is listed once: a search for each image would take quadratic time."""
    suffixes = Image.registered_extensions()
    files: defaultdict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes:
            files[path.stem].append(path)
    return files


def _single_image(candidates: list[Path], where: str, expected: Path) -> Path:
    if not candidates:
        raise FileNotFoundError(
            f"{where}: no image; looked for {checks.brief(expected)}.* (.jpg, .png or another suffix that PIL reads)"
        )
    if len(candidates) > 1:
        names = " and ".join(path.name for path in candidates)
        raise ValueError(f"{where}: more than one image: {names} in {expected.parent}; keep one")
    return candidates[0]


def _class_names(annotation_folder: Path) -> list[str]:
    names: set[str] = set()
    problems: list[ValueError | OSError] = []
    for path in sorted(annotation_folder.glob("*.xml")):
        if path.name.startswith("."):  # "._name.xml": macOS adds these to archives
            continue
        try:
            for number, element in enumerate(_parse(path).findall("object"), start=1):
                names.add(_text(element, "name", f"{path}: object {number}"))
        except ValueError as error:
            problems.append(error)
    checks.raise_together(problems, annotation_folder)
    if not names:
        raise ValueError(f"{annotation_folder}: no object in any annotation file, so there are no categories")
    return sorted(names)


def _check_known(categories: list[str], annotation_folder: Path) -> list[str]:
    """A note for each category that no annotation file has: it may be a class of the other data of a project.

    Raises ValueError where the files have no category at all, or one that differs by case only.
    """
    known, notes = _class_names(annotation_folder), []
    problems: list[ValueError | OSError] = []
    none_known = not set(categories) & set(known)
    for name in [name for name in categories if name not in known]:
        same = [other for other in known if other.casefold() == name.casefold()]
        similar = same or difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {shorten(similar[0])}?" if similar else f"known: {checks.first_names(known)}"
        text = f"no object of class {shorten(name)} in any file; {hint}"
        if same or none_known:
            problems.append(ValueError(f"{annotation_folder}: {text}"))
        notes.append(text)
    checks.raise_together(problems, annotation_folder)
    return notes


class _NoDoctype(ET.TreeBuilder):
    """Refuses a DOCTYPE before its entities are expanded ("billion laughs"). VOC files have none."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        raise ValueError("has a DOCTYPE, which is refused because its entities can fill the memory; remove it")


def _parse(path: Path) -> ET.Element:
    try:
        root = ET.fromstring(checks.read_bytes(path), parser=ET.XMLParser(target=_NoDoctype()))
    except ET.ParseError as error:
        raise ValueError(f"{path}: not well-formed XML: {error}") from error
    except (ValueError, LookupError) as error:  # a DOCTYPE, or an encoding that expat does not know
        raise ValueError(f"{path}: {error}") from error
    if root.tag != "annotation":
        raise ValueError(f"{path}: not a VOC annotation: expected <annotation> at the top, got <{root.tag}>")
    return root


def _text(element: ET.Element, tag: str, where: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"{where}: <{tag}> is missing or empty")
    return text


def _read_object(element: ET.Element, where: str) -> _Object:
    box = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = _text(element, f"bndbox/{tag}", where)
        value = checks.number(text)
        if value is None:
            raise ValueError(f"{where}: <{tag}> is {shorten(text)}, expected a number of pixels")
        box.append(value)
    difficult = (element.findtext("difficult") or "").strip().lower() in ("1", "true")
    return _Object(_text(element, "name", where), box, difficult, where)


def _image_size(xml: ET.Element, xml_file: Path, image_file: Path, notes: list[str]) -> tuple[int, int]:
    """(width, height) of the image file: rotated by its EXIF tag if the XML has that size, else as it is stored."""
    width, height = checks.image_size(image_file, upright=False)
    declared = tuple((xml.findtext(f"size/{side}") or "").strip() for side in ("width", "height"))
    if declared != (str(width), str(height)):
        upright = checks.image_size(image_file, upright=True)
        if declared == tuple(map(str, upright)):  # the boxes were drawn on the image as it is shown
            return upright
        swapped = declared == (str(height), str(width))
        advice = " (width and height are swapped: were the boxes drawn on a rotated image?)" if swapped else ""
        shown = " x ".join(text[:20] or "(none)" for text in declared)
        notes.append(
            f"size: {xml_file}: has {shown}, used {width} x {height} of {image_file.name}; the boxes are "
            f"unchanged{advice}"
        )
    return width, height
