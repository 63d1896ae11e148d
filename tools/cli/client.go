package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/rpc"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// ClientFile is the name of the file in the state folder that tells this command where the services are.
const ClientFile = "client.yaml"

// ClientConfig is client.yaml.
type ClientConfig struct {
	// Version of the file; 1.
	Version int `yaml:"version"`
	// Site that VM names on the command line belong to.
	Site string `yaml:"site"`
	// Certificates is the folder with cert.pem, key.pem and ca.pem; relative to the file.
	Certificates string `yaml:"certificates"`
	// Endpoints by service name: "scheduler", "failover-orchestrator".
	Endpoints map[string]string `yaml:"endpoints"`
}

// WriteClientConfig writes client.yaml into a state folder, atomically.
func WriteClientConfig(state string, c ClientConfig) error {
	c.Version = 1
	raw, err := yaml.Marshal(c)
	if err != nil {
		return fmt.Errorf("encode %s: %w", ClientFile, err)
	}
	temp := filepath.Join(state, "."+ClientFile)
	if err := os.WriteFile(temp, raw, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", ClientFile, err)
	}
	return os.Rename(temp, filepath.Join(state, ClientFile))
}

// connections are the gRPC connections of one command.
type connections struct {
	config ClientConfig
	dialer *rpc.Dialer
}

func (c *connections) close() {
	if c != nil {
		_ = c.dialer.Close()
	}
}

func defaultState() string {
	if s := os.Getenv("LANDFALL_STATE"); s != "" {
		return s
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ".landfall"
	}
	return filepath.Join(home, ".landfall")
}

// connect reads client.yaml once.
func (a *app) connect() (*connections, error) {
	if a.conns != nil {
		return a.conns, nil
	}
	path := filepath.Join(a.state, ClientFile)
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE,
			"there is no %s: start `landfall up --state %s`, or name its folder with --state or LANDFALL_STATE", path, a.state)
	}
	if err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, err, "read %s", path)
	}
	var c ClientConfig
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, err, "read %s", path)
	}
	if c.Version != 1 {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "%s has version %d, this program reads 1", path, c.Version)
	}
	certs := c.Certificates
	if !filepath.IsAbs(certs) {
		certs = filepath.Join(a.state, certs)
	}
	id, err := rpc.LoadIdentity(certs, time.Now)
	if err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAUTHENTICATED, err, "load client certificate")
	}
	if end := id.Files.NotAfter(); time.Now().After(end) {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAUTHENTICATED, "the client certificate in %s expired at %s", certs, end.UTC().Format(time.RFC3339))
	}
	a.conns = &connections{config: c, dialer: rpc.NewDialer(rpc.DialerOptions{Identity: id, UnaryTimeout: callTimeout})}
	return a.conns, nil
}

func (a *app) conn(service string) (grpc.ClientConnInterface, error) {
	c, err := a.connect()
	if err != nil {
		return nil, err
	}
	address := c.config.Endpoints[service]
	if address == "" {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, "%s names no endpoint of %s", filepath.Join(a.state, ClientFile), service)
	}
	return c.dialer.Conn(address, rpc.ExpectService(service))
}

func (a *app) protection(context.Context) (schedulerv1.ProtectionServiceClient, error) {
	c, err := a.conn("scheduler")
	if err != nil {
		return nil, err
	}
	return schedulerv1.NewProtectionServiceClient(c), nil
}

func (a *app) policies(context.Context) (schedulerv1.PolicyServiceClient, error) {
	c, err := a.conn("scheduler")
	if err != nil {
		return nil, err
	}
	return schedulerv1.NewPolicyServiceClient(c), nil
}

func (a *app) jobService(context.Context) (schedulerv1.JobServiceClient, error) {
	c, err := a.conn("scheduler")
	if err != nil {
		return nil, err
	}
	return schedulerv1.NewJobServiceClient(c), nil
}

func (a *app) eventService(context.Context) (schedulerv1.EventServiceClient, error) {
	c, err := a.conn("scheduler")
	if err != nil {
		return nil, err
	}
	return schedulerv1.NewEventServiceClient(c), nil
}

func (a *app) failovers(context.Context) (failoverv1.FailoverServiceClient, error) {
	c, err := a.conn("failover-orchestrator")
	if err != nil {
		return nil, err
	}
	return failoverv1.NewFailoverServiceClient(c), nil
}

// call bounds one command's unary calls.
func (a *app) call(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	return context.WithTimeout(cmd.Context(), callTimeout)
}

// vmName is the resource name of what the user typed: a full name, a GUID or a display name.
func (a *app) vmName(s string) string {
	if strings.HasPrefix(s, "sites/") {
		return s
	}
	site := "local"
	if c, err := a.connect(); err == nil {
		site = c.config.Site
	}
	return "sites/" + site + "/vms/" + s
}

// resource prefixes a bare id with its collection.
func resource(collection, id string) string {
	if strings.HasPrefix(id, collection+"/") {
		return id
	}
	return collection + "/" + id
}

func notFound(vm string) error {
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "no registered host has a machine %q", vm).With("vm", vm)
}

// protoDuration turns 1m30s into the seconds form of proto-JSON.
func protoDuration(s string) (string, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%.9fs", d.Seconds()), nil
}
