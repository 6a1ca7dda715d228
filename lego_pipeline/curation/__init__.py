"""Curation: from raw egocentric video with annotated actions to pairs with descriptions.

`actions` and the readers (`ego4d`, `epic`, `table`) give annotated actions, `video` decodes, `boxes` finds boxes of
hands and objects, `measures` and `similarity` judge frames and pairs, `frames` picks the pair of an action or says why
there is none, `work` shares this over processes and keeps what was done, `report` shows what was dropped and why.
The paper's own curation code was not released; the band of similarities, the offsets d_i and d_o and the screening of
blurred frames are those that it names (Lai et al., ECCV 2024, section 4.1 and supplement).
"""
