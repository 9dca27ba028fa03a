"""What several tests share and no fixture needs to make."""
