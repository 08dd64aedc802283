"""A DICOM file as 8-bit RGB pictures in display orientation, and what its header says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .captions import Facts

# BodyPartExamined and, where it is missing, US ImageType value 3 (C.8.5.6.1.1), to our labels.
_BODY_PARTS = {
    "HEAD": "head",
    "CHEST": "chest",
    "ABDOMEN": "abdomen",
    "PANCREAS": "abdomen",
    "WHOLE BODY": "whole body",
    "EPICARDIAL": "heart",
    "TEE": "heart",
    "ABDOM/RAD": "abdomen",
}
_VIEWS = {"PA": "posteroanterior (PA) view", "AP": "anteroposterior (AP) view"}
_APPLICATIONS = {
    "SMALL PARTS": "small parts examination",
    "EPICARDIAL": "echocardiogram",
    "TEE": "transesophageal echocardiogram",
    "ABDOM/RAD": "abdominal examination",
}
_OBLIQUE_DEGREES = 25.0  # a plane tilted more than this from the body's axes has no plain name
_SOFT_TISSUE = (40.0, 400.0)  # centre and width in HU, where a CT header gives none
_BONE = (500.0, 2000.0)


def _text(header: Any, keyword: str) -> str:
    value = header.get(keyword)
    return "" if value is None else str(value).strip()


def _number(header: Any, keyword: str) -> float | None:
    value = header.get(keyword)
    return float(value) if value not in (None, "") else None


def _image_type(header: Any) -> str:
    values = header.get("ImageType", [])
    return str(values[2]).strip() if len(values) > 2 else ""


def _body_part(header: Any) -> str | None:
    examined = _text(header, "BodyPartExamined").upper()
    if examined in _BODY_PARTS:
        return _BODY_PARTS[examined]
    if "LOWER LEG" in _text(header, "AcquisitionDeviceProcessingDescription").upper():
        return "lower leg"
    if _text(header, "StudyDescription").upper() == "SHOULDER":
        return "shoulder"
    # OM: slices are counted from the orbitomeatal line, which only heads have.
    if _text(header, "PositionReferenceIndicator") == "OM":
        return "head"
    return _BODY_PARTS.get(_image_type(header).upper())


def orientation(header: Any) -> tuple[str | None, float, bool, bool]:
    """(plane or None if oblique or unknown, tilt in degrees, flip rows, flip columns).

    Flips bring the picture to the usual display: anterior or superior up, patient's right (in
    sagittal planes: anterior) at the left. From ImageOrientationPatient, C.7.6.2.1.1 (LPS axes),
    or for projections from PatientOrientation, C.7.6.1.1.1.
    """
    cosines = header.get("ImageOrientationPatient")
    if cosines is None:
        letters = header.get("PatientOrientation") or ("", "")
        return None, 0.0, str(letters[1]).startswith("H"), str(letters[0]).startswith("R")
    row = np.array([float(value) for value in cosines[:3]])
    column = np.array([float(value) for value in cosines[3:]])
    normal = np.cross(row, column)
    axis = int(np.argmax(np.abs(normal)))
    tilt = float(np.degrees(np.arccos(min(1.0, abs(normal[axis])))))
    along_row, along_column = int(np.argmax(np.abs(row))), int(np.argmax(np.abs(column)))
    flip_columns = bool(row[along_row] < 0)
    flip_rows = bool(column[along_column] > 0) if along_column == 2 else bool(column[along_column] < 0)
    plane = ("sagittal", "coronal", "axial")[axis] if tilt <= _OBLIQUE_DEGREES else None
    return plane, tilt, flip_rows, flip_columns


def _details(header: Any, tilt: float, plane: str | None) -> list[str]:
    modality = _text(header, "Modality")
    details = []
    if (thickness := _number(header, "SliceThickness")) is not None:
        details.append(f"slice thickness {thickness:g} mm")
    if modality == "CT" and (voltage := _number(header, "KVP")) is not None:
        details.append(f"{voltage:g} kVp")
    if modality == "CT" and _text(header, "BodyPartExamined").upper() == "PANCREAS":
        details.append("pancreas study")
    if (field := _number(header, "MagneticFieldStrength")) is not None:
        details.append(f"{field:.1f} tesla")
    sequences = {"SE": "spin echo", "GR": "gradient echo", "IR": "inversion recovery"}
    if (sequence := sequences.get(_text(header, "ScanningSequence"))) is not None:
        details.append(sequence)
    if modality == "MR" and (echo := _number(header, "EchoTime")) is not None:
        details.append(f"echo time {echo:.0f} ms")
    if _text(header, "ContrastBolusAgent"):
        details.append("with contrast agent")
    if (view := _VIEWS.get(_text(header, "ViewPosition"))) is not None:
        details.append(view)
    if _text(header, "Laterality") == "R" and modality == "CR":
        details.append("right side")
    if modality == "US" and (use := _APPLICATIONS.get(_image_type(header).upper())) is not None:
        details.append(use)
    if modality == "NM" and _text(header, "StudyDescription"):
        details.append(f"{_text(header, 'StudyDescription').lower()} scan")
    if tilt > _OBLIQUE_DEGREES:
        details.append("oblique plane")
    elif plane is not None and tilt > 5:
        details.append(f"tilted by {tilt:.0f} degrees")
    return details


def header_facts(header: Any, extra_detail: str = "") -> Facts:
    plane, tilt, _, _ = orientation(header)
    if plane is None and _image_type(header).upper() == "AXIAL":
        plane = "axial"
    protocol = _text(header, "ProtocolName").upper()
    details = _details(header, tilt, plane)
    if extra_detail:
        details.insert(0, extra_detail)
    return Facts(
        modality=_text(header, "Modality"),
        body_part=_body_part(header),
        plane=plane,
        sequence="T1" if protocol.startswith(("T1_", "T1W")) else None,
        details=tuple(details),
    )


def _windows(header: Any) -> list[tuple[str, tuple[float, float] | None]]:
    """(words, (centre, width) or None for percentiles); a CT is shown in a bone window as well."""
    centre, width = header.get("WindowCenter"), header.get("WindowWidth")
    named: tuple[float, float] | None = None
    if centre is not None and width is not None:
        # Several windows: the first is the one to show.
        first = [value[0] if hasattr(value, "__len__") else value for value in (centre, width)]
        named = (float(first[0]), float(first[1]))
    if _text(header, "Modality") != "CT":
        return [("", named)]
    named = named or _SOFT_TISSUE
    return [(f"window {named[0]:g}/{named[1]:g} HU", named), ("bone window", _BONE)]


def _to_8_bit(values: np.ndarray, window: tuple[float, float] | None, *, fixed: bool) -> np.ndarray:
    """The window's ramp; unless `fixed`, no wider than what the values use (radiographs come
    with windows over the whole range of the detector).
    """
    low, high = np.percentile(values, [0.5, 99.5])
    if window is not None:
        # C.11.2.1.2.1: the linear ramp from c - 0.5 - (w-1)/2 to c - 0.5 + (w-1)/2.
        start = window[0] - 0.5 - (window[1] - 1) / 2
        low, high = (start, start + window[1] - 1) if fixed else (max(low, start), min(high, start + window[1] - 1))
    return (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).round().astype(np.uint8)


def read(path: Path, frames: tuple[int, ...] = (0,)) -> list[tuple[np.ndarray, Facts]]:
    """Pictures (H, W, 3) uint8 with their facts: one for each frame and, for CT, window.

    YBR becomes RGB, palettes are applied, MONOCHROME1 is inverted, window and rescale applied.
    Raises what pydicom raises where a decoder is missing or the file is broken.
    """
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    header = pydicom.dcmread(path)
    _, _, flip_rows, flip_columns = orientation(header)
    interpretation = header.PhotometricInterpretation
    pictures = []
    for frame in frames:
        pixels = pixel_array(header, index=frame)
        shown: list[tuple[str, np.ndarray]] = []
        if interpretation == "PALETTE COLOR":
            colours = apply_color_lut(pixels, header)
            shown.append(("", (colours >> 8 if colours.dtype == np.uint16 else colours)))
        elif pixels.ndim == 3:
            shown.append(("", pixels))
        else:
            values = np.asarray(apply_modality_lut(pixels, header), dtype=np.float32)
            for words, window in _windows(header):
                grey = _to_8_bit(values, window, fixed=header.Modality == "CT")
                grey = 255 - grey if interpretation == "MONOCHROME1" else grey
                shown.append((words, np.repeat(grey[:, :, None], 3, axis=2)))
        for words, picture in shown:
            picture = picture[::-1] if flip_rows else picture
            picture = picture[:, ::-1] if flip_columns else picture
            facts = header_facts(header, words)
            pictures.append((np.ascontiguousarray(picture, dtype=np.uint8), facts))
    return pictures
