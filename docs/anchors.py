"The anchors that JupyterLab gives to titles."
def slug(title): return title.replace(' ', '-')
