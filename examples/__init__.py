"""Examples: a state machine and Terraform, made of the launcher's own requests and policies."""
