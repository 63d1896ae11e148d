package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"go.yaml.in/yaml/v3"
)

// field is one configurable leaf of a struct.
type field struct {
	key, help string
	v         reflect.Value // addressable
	flag      bool          // may be given on the command line
}

var (
	textType     = reflect.TypeFor[encoding.TextUnmarshaler]()
	durationType = reflect.TypeFor[time.Duration]()
	secretType   = reflect.TypeFor[Secret]()
)

// leaves lists the leaves of the struct that p points to, in order.
func leaves(p any) []field {
	var out []field
	walk(reflect.ValueOf(p).Elem(), "", func(f field) { out = append(out, f) })
	return out
}

func walk(v reflect.Value, prefix string, each func(field)) {
	t := v.Type()
	if t.Kind() != reflect.Struct {
		panic(fmt.Sprintf("config: %s is not a struct", t))
	}
	for i := range t.NumField() {
		sf := t.Field(i)
		tag := sf.Tag.Get("koanf")
		if tag == "-" || !sf.IsExported() {
			continue
		}
		if sf.Anonymous && tag == "" && sf.Type.Kind() == reflect.Struct {
			walk(v.Field(i), prefix, each)
			continue
		}
		if tag == "" || tag != strings.ToLower(tag) || strings.ContainsAny(tag, ". ") || strings.Contains(tag, "__") {
			panic(fmt.Sprintf("config: field %s of %s needs a tag koanf in snake_case", sf.Name, t))
		}
		f := field{key: prefix + tag, help: sf.Tag.Get("help"), v: v.Field(i), flag: sf.Type != secretType}
		switch kind := sf.Type.Kind(); {
		case reflect.PointerTo(sf.Type).Implements(textType) || sf.Type == durationType:
		case kind == reflect.Struct:
			walk(f.v, f.key+".", each)
			continue
		case kind == reflect.Map || kind == reflect.Slice && containsSecret(sf.Type.Elem()):
			f.flag = false
		case kind == reflect.Slice, kind == reflect.String, kind == reflect.Bool,
			kind >= reflect.Int && kind <= reflect.Float64 && kind != reflect.Uintptr:
		default:
			panic(fmt.Sprintf("config: field %s has type %s, which cannot be configured", f.key, sf.Type))
		}
		each(f)
	}
}

func containsSecret(t reflect.Type) bool {
	return t == secretType || t.Kind() == reflect.Struct && !reflect.PointerTo(t).Implements(textType)
}

func (f field) isMap() bool  { return f.v.Kind() == reflect.Map }
func (f field) isBool() bool { return f.v.Kind() == reflect.Bool }

func (f field) typeName() string {
	switch {
	case f.v.Type() == durationType:
		return "duration"
	case f.v.Kind() == reflect.Slice:
		return "list"
	case f.v.Type() == reflect.TypeFor[ByteSize]():
		return "size"
	case reflect.PointerTo(f.v.Type()).Implements(textType):
		return "text"
	}
	return f.v.Kind().String()
}

// text is the value as a flag shows it.
func (f field) text() string {
	switch v := f.v.Interface().(type) {
	case fmt.Stringer:
		return v.String()
	case encoding.TextMarshaler:
		if text, err := v.MarshalText(); err == nil {
			return string(text)
		}
	}
	if f.v.Kind() == reflect.Slice {
		parts := make([]string, f.v.Len())
		for i := range parts {
			parts[i] = fmt.Sprint(f.v.Index(i).Interface())
		}
		return strings.Join(parts, ",")
	}
	return fmt.Sprint(f.v.Interface())
}

// set decodes value, of a file, a variable or a flag, into the field.
func (f field) set(value any) error {
	if value == nil {
		return errors.New("no value")
	}
	fresh := reflect.New(f.v.Type()) // so that old elements of lists and maps do not stay
	decoder, err := mapstructure.NewDecoder(&mapstructure.DecoderConfig{
		Result: fresh.Interface(), TagName: "koanf", ErrorUnused: true, WeaklyTypedInput: true,
		DecodeHook: mapstructure.ComposeDecodeHookFunc(
			strictDuration,
			scalarToText,
			mapstructure.TextUnmarshallerHookFunc(),
			splitList,
		),
	})
	if err != nil {
		return err
	}
	if err := decoder.Decode(value); err != nil {
		return cleaned(err)
	}
	f.v.Set(fresh.Elem())
	return nil
}

// cleaned takes mapstructure's framing off an error.
func cleaned(err error) error {
	text := err.Error()
	text = strings.TrimPrefix(text, "decoding failed due to the following error(s):\n\n")
	text = strings.TrimPrefix(text, "'' ")
	return errors.New(strings.Join(strings.Fields(text), " "))
}

// strictDuration parses durations and refuses numbers without a unit.
func strictDuration(from, to reflect.Type, value any) (any, error) {
	if to != durationType || from == durationType {
		return value, nil
	}
	if n, ok := value.(int); ok && n == 0 {
		return time.Duration(0), nil
	}
	text, ok := value.(string)
	if !ok {
		return nil, fmt.Errorf("%v is no duration: a unit is missing, as in 30s", value)
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return nil, fmt.Errorf("%q is no duration: want a number and a unit, as in 30s", text)
	}
	return d, nil
}

// scalarToText lets a YAML number stand for a type that parses text.
func scalarToText(_, to reflect.Type, value any) (any, error) {
	if !reflect.PointerTo(to).Implements(textType) {
		return value, nil
	}
	switch value.(type) {
	case int, int64, uint64, float64, bool:
		return fmt.Sprint(value), nil
	}
	return value, nil
}

// splitList makes a list of a variable's or flag's "a,b,c".
func splitList(from, to reflect.Type, value any) (any, error) {
	if from.Kind() != reflect.String || to.Kind() != reflect.Slice {
		return value, nil
	}
	text := strings.TrimSpace(reflect.ValueOf(value).String())
	if text == "" {
		return []string{}, nil
	}
	parts := strings.Split(text, ",")
	for i := range parts {
		parts[i] = strings.TrimSpace(parts[i])
	}
	return parts, nil
}

// validate asks every struct in the tree and returns the problems with full keys.
func validate(p any) []*Problem {
	var out []*Problem
	var ask func(v reflect.Value, prefix string)
	ask = func(v reflect.Value, prefix string) {
		if check, ok := v.Addr().Interface().(interface{ Validate() error }); ok {
			out = append(out, flatten(check.Validate(), prefix)...)
		}
		t := v.Type()
		for i := range t.NumField() {
			sf := t.Field(i)
			if tag := sf.Tag.Get("koanf"); sf.IsExported() && tag != "-" && sf.Type.Kind() == reflect.Struct {
				switch {
				case reflect.PointerTo(sf.Type).Implements(textType):
				case tag == "":
					// Its methods are promoted: already asked.
				default:
					ask(v.Field(i), prefix+tag+".")
				}
			}
		}
	}
	ask(reflect.ValueOf(p).Elem(), "")
	return out
}

func flatten(err error, prefix string) []*Problem {
	switch e := err.(type) { //nolint:errorlint // the tree itself is walked
	case nil:
		return nil
	case *Problem:
		return []*Problem{{Key: strings.TrimSuffix(prefix+e.Key, "."), What: e.What}}
	case interface{ Unwrap() []error }:
		var out []*Problem
		for _, inner := range e.Unwrap() {
			out = append(out, flatten(inner, prefix)...)
		}
		return out
	default:
		return []*Problem{{Key: strings.TrimSuffix(prefix, "."), What: err.Error()}}
	}
}

// render writes fields as YAML; with diff only those whose text differs from the
// default's.
func render(fields, defaults []field, diff bool) ([]byte, error) {
	root := &yaml.Node{Kind: yaml.MappingNode}
	for i, f := range fields {
		var node yaml.Node
		if err := node.Encode(printable(f.v)); err != nil {
			return nil, err
		}
		if diff {
			var was yaml.Node
			if err := was.Encode(printable(defaults[i].v)); err != nil {
				return nil, err
			}
			if equalNodes(&node, &was) && !differentSecret(f.v, defaults[i].v) {
				continue
			}
		}
		put(root, strings.Split(f.key, "."), &node, f.help, !diff)
	}
	if len(root.Content) == 0 {
		return []byte("{}\n"), nil
	}
	var out bytes.Buffer
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(2)
	if err := enc.Encode(root); err != nil {
		return nil, err
	}
	return out.Bytes(), enc.Close()
}

func differentSecret(a, b reflect.Value) bool {
	return a.Type() == secretType && a.Interface() != b.Interface()
}

func printable(v reflect.Value) any {
	if v.Type() == durationType {
		return v.Interface().(time.Duration).String()
	}
	if m, ok := v.Interface().(encoding.TextMarshaler); ok {
		if text, err := m.MarshalText(); err == nil {
			return string(text)
		}
	}
	switch v.Kind() {
	case reflect.Slice:
		out := make([]any, v.Len())
		for i := range out {
			out[i] = printable(v.Index(i))
		}
		return out
	case reflect.Map:
		out := map[string]any{}
		for it := v.MapRange(); it.Next(); {
			out[fmt.Sprint(it.Key().Interface())] = printable(it.Value())
		}
		return out
	case reflect.Struct:
		out := map[string]any{}
		for i := range v.NumField() {
			if tag := v.Type().Field(i).Tag.Get("koanf"); tag != "" && tag != "-" {
				out[tag] = printable(v.Field(i))
			}
		}
		return out
	}
	return v.Interface()
}

func equalNodes(a, b *yaml.Node) bool {
	x, errA := yaml.Marshal(a)
	y, errB := yaml.Marshal(b)
	return errA == nil && errB == nil && bytes.Equal(x, y)
}

func put(node *yaml.Node, path []string, value *yaml.Node, help string, comments bool) {
	for i := 0; i < len(node.Content); i += 2 {
		if node.Content[i].Value == path[0] {
			put(node.Content[i+1], path[1:], value, help, comments)
			return
		}
	}
	key := &yaml.Node{Kind: yaml.ScalarNode, Value: path[0]}
	if len(path) == 1 {
		if comments && help != "" {
			key.HeadComment = help
		}
		node.Content = append(node.Content, key, value)
		return
	}
	section := &yaml.Node{Kind: yaml.MappingNode}
	node.Content = append(node.Content, key, section)
	put(section, path[1:], value, help, comments)
}

// flagValue keeps a flag as text; Load decodes it like the other layers.
type flagValue struct{ text, typ string }

func (f *flagValue) String() string     { return f.text }
func (f *flagValue) Set(s string) error { f.text = s; return nil }
func (f *flagValue) Type() string       { return f.typ }
