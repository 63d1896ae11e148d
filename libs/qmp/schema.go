package qmp

import (
	"context"
	"fmt"
)

// Schema says what a QEMU can do: query-qmp-schema. Features are looked for here, never by version: distributions backport.
type Schema struct {
	entities map[string]entity
}

type entity struct {
	Name     string `json:"name"`
	MetaType string `json:"meta-type"`
	ArgType  string `json:"arg-type"`
	Tag      string `json:"tag"`
	Members  []struct {
		Name string `json:"name"`
		Type string `json:"type"`
	} `json:"members"`
	Values   []string `json:"values"`
	Variants []struct {
		Case string `json:"case"`
		Type string `json:"type"`
	} `json:"variants"`
}

// Schema asks once per connection.
func (m *Monitor) Schema(ctx context.Context) (*Schema, error) {
	m.schemaOnce.Lock()
	defer m.schemaOnce.Unlock()
	if m.schema != nil {
		return m.schema, nil
	}
	var all []entity
	if err := m.Execute(ctx, "query-qmp-schema", nil, &all); err != nil {
		return nil, fmt.Errorf("ask for the schema: %w", err)
	}
	s := &Schema{entities: make(map[string]entity, len(all))}
	for _, e := range all {
		s.entities[e.Name] = e
	}
	m.schema = s
	return s, nil
}

// Command reports whether the command exists.
func (s *Schema) Command(name string) bool { return s.entities[name].MetaType == "command" }

// Argument reports whether the command takes the argument.
func (s *Schema) Argument(command, name string) bool {
	_, ok := s.member(s.entities[command].ArgType, name)
	return ok
}

// BlockDriver reports whether blockdev-add knows the driver and all the options.
func (s *Schema) BlockDriver(driver string, options ...string) bool {
	for _, v := range s.entities[s.entities["blockdev-add"].ArgType].Variants {
		if v.Case != driver {
			continue
		}
		for _, o := range options {
			if _, ok := s.member(v.Type, o); !ok {
				return false
			}
		}
		return true
	}
	return false
}

func (s *Schema) member(object, name string) (string, bool) {
	for _, m := range s.entities[object].Members {
		if m.Name == name {
			return m.Type, true
		}
	}
	return "", false
}
