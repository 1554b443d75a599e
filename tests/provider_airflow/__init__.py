"""Tests of the Airflow provider, under a real Airflow."""
