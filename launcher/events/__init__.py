"""What tells people, or other programs, that jobs have ended: a rule of EventBridge, and where it sends what."""
