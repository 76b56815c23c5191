// Renders an ollama template with Go's own text/template. `tests/test_modelfile.py` runs it.
//
// stdin: {"template": TEXT, "conversations": [{"messages": [...], "tools": [...]}, ...]}; stdout: a JSON list of texts.
// What a template is given are ollama's names and functions (ollama, template/template.go and api/types.go).
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type call struct {
	Function struct {
		Name      string         `json:"name"`
		Arguments map[string]any `json:"arguments"`
	} `json:"function"`
}

type message struct {
	Role      string `json:"role"`
	Content   string `json:"content"`
	ToolCalls []call `json:"tool_calls"`
}

type tool struct {
	Type     string `json:"type"`
	Function struct {
		Name        string `json:"name"`
		Description string `json:"description,omitempty"`
		Parameters  any    `json:"parameters"`
	} `json:"function"`
}

func main() {
	var request struct {
		Template      string
		Conversations []struct {
			Messages []*message
			Tools    []tool
		}
	}
	if err := json.NewDecoder(os.Stdin).Decode(&request); err != nil {
		panic(err)
	}
	functions := template.FuncMap{"json": func(value any) string {
		text, _ := json.Marshal(value)
		return string(text)
	}}
	parsed := template.Must(template.New("").Option("missingkey=zero").Funcs(functions).Parse(request.Template))
	texts := []string{}
	for _, conversation := range request.Conversations {
		system := []string{}
		for _, message := range conversation.Messages {
			if message.Role == "system" {
				system = append(system, message.Content)
			}
		}
		var text strings.Builder
		err := parsed.Execute(&text, map[string]any{
			"System": strings.Join(system, "\n\n"), "Messages": conversation.Messages, "Tools": conversation.Tools, "Response": "",
		})
		if err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
