"""Generate README's figure and numbers, the pages of the reference, the tutorials' notebooks and the docs site.

    python -m docs.generate readme          # README.md, docs/figures, examples/zero_shot.ipynb
    python -m docs.generate site FOLDER     # the sources of the site, which sphinx-build reads

Nothing here imports the package. griffe reads its source, so the site needs neither torch nor a compiler.
"""
