"""Makes the base model that comes with the project, and its judge, once a year on a GPU.

``toys`` says what a toy and a photo of it are, and what a caption and a classifier say about it; ``paint`` draws it;
``train`` makes the base and the judge again, from pictures that are painted for it. All of it imports
``dreambooth_sm``; nothing in ``dreambooth_sm``, ``launcher`` or ``container`` imports it.
"""
