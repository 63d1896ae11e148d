package recovery

import (
	"encoding/json"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// protoDocument is a message as `landfall policy apply` and `landfall plan apply` take it.
func protoDocument(m proto.Message) json.RawMessage {
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return json.RawMessage("null") // messages that were decoded can be encoded
	}
	return raw
}
