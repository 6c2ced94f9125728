"""What a task imports first."""

import subprocess
import sys

CODE = """
from pathlib import Path
import transformers
from sedtrain.imports import list_models_once
from transformers.utils import import_utils
list_models_once()
structure = import_utils.create_import_structure_from_path
file = Path(transformers.__file__).parent / "models" / "__init__.py"
assert structure(str(file)) is structure(file.parent)
assert structure(str(file.parent / "bert")) == structure(str(file.parent / "bert" / "__init__.py"))
assert structure(str(file)) == structure(str(file.parent))  # read anew
from transformers import BertModel, models
assert models.bert.BertModel is BertModel
"""


def test_the_models_of_transformers_are_listed_once_and_as_they_are():
    subprocess.run([sys.executable, "-c", CODE], check=True)
