"""The presets as a package, so that an installed program finds them: retina.load("COCO_V1") reads its settings here."""
