package program

import (
	"errors"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/config"
)

// Settings are what every program of the fleet is told. Section "program" of its configuration.
type Settings struct {
	Site         string            `koanf:"site" help:"site that this program serves"`
	Listen       string            `koanf:"listen" help:"address of the gRPC server, host:port"`
	Certificates string            `koanf:"certificates" help:"folder with cert.pem, key.pem and ca.pem"`
	Admin        string            `koanf:"admin" help:"plaintext address of health, metrics and profiles; empty serves none"`
	Bus          BusSettings       `koanf:"bus"`
	Store        backend.Settings  `koanf:"store"`
	Peers        map[string]string `koanf:"peers" help:"addresses of services that do not run on hosts, by name"`
	Log          LogSettings       `koanf:"log"`
	Trace        TraceSettings     `koanf:"trace"`
	DrainDelay   time.Duration     `koanf:"drain_delay" help:"how long to serve after saying that it will stop"`
	Failpoints   string            `koanf:"failpoints" help:"points at which a test lets the program fail, name=action;..."`
}

// BusSettings say where the event server is.
type BusSettings struct {
	URL     string        `koanf:"url" help:"nats://host:4222 or tls://host:4222"`
	CA      string        `koanf:"ca" help:"CA file of the event server"`
	Cert    string        `koanf:"cert" help:"client certificate file"`
	Key     string        `koanf:"key" help:"client key file"`
	Token   config.Secret `koanf:"token" help:"token, when the server asks for one"`
	Monitor string        `koanf:"monitor" help:"monitoring endpoint, http://host:8222, asked whether state is durable"`
	AckWait time.Duration `koanf:"ack_wait" help:"how long a work queue waits for a worker's sign of life; 0 takes the default"`
}

// LogSettings say how logs look.
type LogSettings struct {
	Format string `koanf:"format" help:"text or json"`
	Level  string `koanf:"level" help:"debug, info, warn or error"`
}

// TraceSettings say where spans go.
type TraceSettings struct {
	Exporter string `koanf:"exporter" help:"none, stdout or otlp"`
	Endpoint string `koanf:"endpoint" help:"OTLP collector, http://host:4317"`
}

// DefaultSettings are sensible for a fleet on one machine; the rest has no default.
func DefaultSettings() Settings {
	return Settings{
		Site: "local", Listen: "127.0.0.1:0", Peers: map[string]string{}, DrainDelay: 3 * time.Second, Store: backend.DefaultSettings(),
		Log: LogSettings{Format: "json", Level: "info"}, Trace: TraceSettings{Exporter: "none"},
	}
}

// Validate reports all problems at once.
func (s Settings) Validate() error {
	var problems []error
	for key, v := range map[string]string{"site": s.Site, "listen": s.Listen, "certificates": s.Certificates, "bus.url": s.Bus.URL} {
		if v == "" {
			problems = append(problems, config.Bad(key, "must not be empty"))
		}
	}
	oneOf := func(key, v string, allowed ...string) {
		for _, a := range allowed {
			if v == a {
				return
			}
		}
		problems = append(problems, config.Bad(key, "%q is not one of %v", v, allowed))
	}
	oneOf("log.format", s.Log.Format, "text", "json")
	oneOf("log.level", s.Log.Level, "debug", "info", "warn", "error")
	oneOf("trace.exporter", s.Trace.Exporter, "none", "stdout", "otlp")
	if a := s.Bus.AckWait; a != 0 && (a < time.Second || a > 10*time.Minute) {
		problems = append(problems, config.Bad("bus.ack_wait", "%s must be 0 or 1s to 10m", a))
	}
	if s.DrainDelay < 0 || s.DrainDelay > time.Minute {
		problems = append(problems, config.Bad("drain_delay", "%s must be 0 to 1m", s.DrainDelay))
	}
	return errors.Join(problems...)
}
