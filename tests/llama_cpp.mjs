// llama.cpp, as node-llama-cpp brings it prebuilt, as an oracle for GGUF files. `tests/llama_cpp.py` starts it.
//
// argv: a folder. folder/request.json: {"model": PATH, "context": N, "cache": "F32", "texts": [...], "plain": [...],
//       "loras": [{"filePath": PATH, "scale": 1}], "prompts": [{"ids": [...], "all": true, "greedy": 64}, ...]}
// folder/answer.json: {"texts": [[id, ...], ...], "plain": [[id, ...], ...], "vocabulary": N, "greedy": [[id, ...], ...]}
// folder/probabilities: float32 rows (vocabulary,) of each prompt: the next token's after every id ("all"), else after
// the last.
//
// "texts" are tokenized with control tokens recognized, "plain" without.
import {closeSync, openSync, readFileSync, writeFileSync, writeSync} from "fs";
import {createRequire} from "module";
import {pathToFileURL} from "url";

const home = createRequire(`${process.env.PHI3_MLX_LLAMA_CPP}/package.json`);
const {getLlama} = await import(pathToFileURL(home.resolve("node-llama-cpp")).href);
const folder = process.argv[2];
const request = JSON.parse(readFileSync(`${folder}/request.json`, "utf8"));
// One thread: others wait for it at every step by turning in circles, which costs most where processes share the cores.
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: "error"});
const model = await llama.loadModel({modelPath: request.model});
const answer = {greedy: []};
for (const kind of ["texts", "plain"])
    answer[kind] = (request[kind] ?? []).map((text) => model.tokenize(text, kind === "texts"));

const wanted = {generateNext: {token: true, probabilities: true}};
const rows = request.prompts?.length ? openSync(`${folder}/probabilities`, "w") : null;

function written({next: {probabilities}}) {
    const row = new Float32Array(probabilities.size);
    let best = 0;
    for (const [token, probability] of probabilities)
        row[token] = probability;
    for (let token = 1; token < row.length; token++)
        if (row[token] > row[best]) best = token;
    answer.vocabulary = row.length;
    return {row, best};
}

if (rows !== null) {
    const lora = request.loras?.length ? {adapters: request.loras} : undefined;
    const cache = {flashAttention: false, experimentalKvCacheKeyType: request.cache, experimentalKvCacheValueType: request.cache};
    const context = await model.createContext({contextSize: request.context, batchSize: 512, lora, threads: 1, ...cache});
    const sequence = context.getSequence();
    for (const {ids, all, greedy} of request.prompts) {
        await sequence.clearHistory();
        const input = ids.map((id, i) => all || i === ids.length - 1 ? [id, wanted] : id);
        const results = (await sequence.controlledEvaluate(input)).filter((result) => result?.next !== undefined);
        let last;
        for (const result of results) {
            last = written(result);
            writeSync(rows, last.row);
        }
        const tokens = [];
        while (tokens.length < (greedy ?? 0)) {
            tokens.push(last.best);
            if (tokens.length < greedy)
                last = written((await sequence.controlledEvaluate([[last.best, wanted]]))[0]);
        }
        answer.greedy.push(tokens);
    }
    closeSync(rows);
}
writeFileSync(`${folder}/answer.json`, JSON.stringify(answer));
process.exit(0);  // its worker threads would keep the process
