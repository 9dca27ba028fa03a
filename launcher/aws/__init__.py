"""The account: its clients, roles, images, buckets and quotas, what lies in its S3, and what goes wrong with it."""
