// Lint the viewer's scripts as they run: joined in the order that viewer.py names, so that a name which no script
// declares, or none uses, is found. Messages name the script and its line.
import { readFileSync } from "node:fs";
import { ESLint } from "eslint";
import js from "@eslint/js";
import globals from "globals";

const folder = new URL("../sparsewsi/web/viewer/", import.meta.url);
const [, listed] = readFileSync(new URL("viewer.py", folder), "utf8").match(/^SCRIPTS = \(([^)]+)\)/m);
const lines = listed.match(/\w+/g).flatMap((name) => {
  const text = readFileSync(new URL(`${name}.js`, folder), "utf8").trimEnd();
  return text.split("\n").map((line, at) => ({ line, place: `${name}.js:${at + 1}` }));
});

const given = Object.fromEntries(["element", "props", "trigger", "watch"].map((name) => [name, "readonly"]));
const eslint = new ESLint({
  overrideConfigFile: true,
  baseConfig: [
    js.configs.recommended,
    {
      languageOptions: { sourceType: "script", globals: { ...globals.browser, ...given } },
      linterOptions: { reportUnusedDisableDirectives: "error" },
      rules: {
        eqeqeq: "error",
        "no-implicit-globals": "off",
        "no-redeclare": ["error", { builtinGlobals: false }],
        "no-use-before-define": ["error", { functions: false, variables: false }],
        "no-var": "error",
        "one-var": ["error", "never"],
        "prefer-const": "error",
      },
    },
  ],
});
const [{ messages }] = await eslint.lintText(lines.map(({ line }) => line).join("\n"), { filePath: "viewer.js" });
for (const { line, message, ruleId } of messages) console.error(`${lines[line - 1].place}  ${message}  (${ruleId})`);
process.exitCode = messages.length ? 1 : 0;
