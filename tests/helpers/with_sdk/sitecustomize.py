"""A folder for PYTHONPATH: the SageMaker SDKs check what is configured, and not each time their own schema as well.

They look some twenty values up for each request, and the schema of configurations takes a quarter of a second.
"""

from jsonschema.validators import Draft202012Validator

Draft202012Validator.check_schema = classmethod(lambda *_, **__: None)  # type: ignore[assignment]
