"""Short or long reasoning for each query (ThinkSwitcher): labels, features, a switcher, its threshold, and a proxy.

    families.py          the known ways to tell a model to think or not, as a table
    modes.py             a model's two modes: rendered, compared, sent
    run_file.py          run file of `fusemega switch`
Labels
    label.py             `fusemega switch label`
    verdicts.py          which responses are right
    labels.py            the file of labels
Features
    features.py          `fusemega switch features`: one hidden state of each prompt
    prompt_samples.py    prompts as samples of a pass
    short_answers.py     the log-probability of each short answer
The switcher
    network.py           the network, its loss and calibration
    train.py             `fusemega switch train`
    switcher.py          its folder
    curve.py             accuracy against tokens, with bands
    calibrate.py         `fusemega switch calibrate`
    baselines.py         other choices
    evaluate.py          `fusemega switch eval`
In use
    serve.py             `fusemega switch serve`: settings and checks before the start
    proxy.py             the proxy; metrics.py: what it counts
    decision.py          the mode of one request
    prefill.py           where its features come from
    wrapper.py           the same around a transformers model, with one prefill for both
"""
