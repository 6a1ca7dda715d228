"""`lego app`: a page in the browser on which actions are described, painted, compared and chained.

`painter` asks the pipeline, `results` writes what can be downloaded, `drift` measures a storyboard; none of them knows
Gradio. `page` lays the page out and `server` shows it.
"""
