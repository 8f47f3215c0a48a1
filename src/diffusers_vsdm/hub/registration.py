"""Making our classes loadable by name.

Diffusers resolves the entries of a `model_index.json` through tables that have no public face. With our library in
them an index reads `["diffusers_vsdm", "VSDMScheduler"]` and loads after `import diffusers_vsdm`; without, loading
asks for `trust_remote_code`.
"""

from types import ModuleType

import diffusers


LIBRARY = "diffusers_vsdm"
SAVE_AND_LOAD = ["save_pretrained", "from_pretrained"]


def register(library: ModuleType, components: tuple[str, ...], pipelines: tuple[str, ...]) -> None:
    """Enter `components` and `pipelines`, names of classes in `library`, into Diffusers' tables.

    Raises:
        ImportError: The installed Diffusers keeps its tables elsewhere.
    """
    classes = {name: SAVE_AND_LOAD for name in components}
    try:
        from diffusers.pipelines import pipeline_loading_utils as tables

        tables.LOADABLE_CLASSES[LIBRARY] = classes
        tables.ALL_IMPORTABLE_CLASSES.update(classes)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"diffusers {diffusers.__version__} has moved the tables that its pipelines load components by"
            f" ({error}). Install the version of diffusers that this release of {LIBRARY} was tested with, or a newer"
            f" {LIBRARY}."
        ) from error
    # `DiffusionPipeline.from_pretrained` looks the pipeline's class up there; the scheduler stays out, so that stock
    # classes built from its configuration still warn about the keys that they drop
    for name in pipelines:
        setattr(diffusers, name, getattr(library, name))
