"""Makes the small base models of toys, and their judge, once a year on a GPU.

``toys`` says what a toy and a photo of it are, and what a caption and a classifier say about it; ``paint`` draws it;
``train`` makes the base that comes with the project and the judge again, from pictures that are painted for it, and
``train_flow`` a base that matches flows. All of it imports ``dreambooth_sm``; nothing in ``dreambooth_sm``,
``launcher`` or ``container`` imports it.
"""
