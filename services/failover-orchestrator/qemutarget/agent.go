package qemutarget

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// agentRetry is how often the guest agent is asked. A question that nobody hears waits in the channel until the agent
// opens it, but a guest that restarts loses it.
const agentRetry = 2 * time.Second

// awaitAgent returns nil when the guest's agent has answered a question of ours, or when ctx ends its cause.
func awaitAgent(ctx context.Context, dir string) error {
	for {
		if err := askAgent(ctx, dir); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(agentRetry / 10): // the socket is not there yet, or busy, or broke
		}
	}
}

// askAgent asks on one connection until the answer comes or the connection breaks.
func askAgent(ctx context.Context, dir string) error {
	conn, err := dial(ctx, dir, AgentSocket)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	var random [8]byte
	_, _ = rand.Read(random[:])
	id := int64(binary.BigEndian.Uint64(random[:]) >> 12) // exact in JSON
	// 0xFF resets the agent's parser; answers to others' questions are told apart by the id.
	question := fmt.Appendf([]byte{0xFF}, `{"execute":"guest-sync-delimited","arguments":{"id":%d}}`+"\n", id)
	in := bufio.NewReaderSize(conn, 64<<10)
	for {
		if err := conn.SetDeadline(time.Now().Add(agentRetry)); err != nil { //nolint:forbidigo // a socket's deadline
			return err
		}
		if _, err := conn.Write(question); err != nil {
			return err
		}
		for {
			line, err := in.ReadSlice('\n')
			if isTimeout(err) {
				break // ask again
			}
			if err != nil {
				return err
			}
			for len(line) > 0 && line[0] == 0xFF {
				line = line[1:]
			}
			var answer struct{ Return *int64 }
			if json.Unmarshal(line, &answer) == nil && answer.Return != nil && *answer.Return == id {
				return nil
			}
		}
	}
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}
