"""Responses to prompts: sampled from a model here or behind a server, recorded as they come, and made into groups.

    prompts.py               reads prompts, and the key that a prompt is known by
    run_file.py, sample.py   `fusemega sample`
    responses.py             the file of one source's responses, which only grows
    collect.py               `fusemega collect`
    progress.py              what is done, and what it cost
    engine.py, engines.py    what every engine takes and gives; their settings
    rendered.py              prompts as token ids
Engine `transformers`
    transformers_engine.py   batched `generate`
    batches.py               which requests are computed together
    draw.py                  each response with random numbers of its own
Engine `openai`
    openai_engine.py         requests and answers
    server.py                the client, the key, the model's name
    completion.py            reads an answer
    account.py               what is answered, refused, failed; when to give up
"""
